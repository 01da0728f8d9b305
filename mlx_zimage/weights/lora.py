"""LoRA files in every trainer's dialect, read into differences of named weights.

Trainers spell a layer's path with dots or underscores, with or without a prefix, split or fused, in diffusers' names or
ComfyUI's. All of them become the same once "." is replaced by "_", so one table built from the model (`Names`)
resolves every spelling without guessing. Everything a file has for one weight becomes a `Delta`; a key that is neither
part of one nor known to add nothing is an error, and never skipped.

Sources: the trainers' own code (ai-toolkit, musubi-tuner, OneTrainer, DiffSynth-Studio, SimpleTuner, LyCORIS, PEFT,
diffusers, mflux) and ComfyUI's loader.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..dtypes import FLOAT_SPELLINGS
from ..errors import CheckpointError, ModelNotFoundError
from ..models.runner import NetworkConfig
from ..untrusted import brief, open_regular, parse_json
from .component import Entry, read_header, read_json, read_metadata
from .deltas import Delta, Dense, DoRA, Hadamard, Kronecker, LowRank, Replacement, is_finite
from .hub import REPOSITORY_ID, Repository, check_inside, check_name
from .listing import is_hidden
from .manifest import sha256
from .names import Place, comfyui_name, some
from .unchanged import unchanged

ADAPTED = ("text_encoder", "transformer")  # the networks that a LoRA may change
MAX_LORA_TENSORS = 5000  # with six for each layer of both networks, it would have 3100
ADAPTER = "adapter_model.safetensors"  # PEFT's, with adapter_config.json beside it
HEADER_CONFIG = "lora_adapter_metadata"  # the same config, as diffusers stores it in a header

# Prefixes of a layer's path, "." written as "_". Several may follow each other, as in text_encoders.X.transformer.
PREFIX = re.compile(
    r"(base_model_model|model_diffusion_model|diffusion_model|text_encoders_[a-z0-9]+(_[0-9]+b)?|lora_transformer|"
    r"lora_unet_?|lora_te\d?|lycoris|transformer|text_encoder)_"
)
# What follows a layer's path: a factor or another part of its difference. `.default` and the like name PEFT's adapter.
PARTS = {
    "down": r"[._]lora(_A|_down|\.down|_linear_layer\.down)(\.\w+)??(\.weight)?",
    "up": r"[._]lora(_B|_up|\.up|_linear_layer\.up)(\.\w+)??(\.weight)?",
    "alpha": r"\.alpha",
    "magnitude": r"\.(dora_scale|magnitude|lora_magnitude_vector)(\.\w+)??(\.weight)?",
    "w1": r"\.lokr_w1",
    "w1_a": r"\.lokr_w1_a",
    "w1_b": r"\.lokr_w1_b",
    "w2": r"\.lokr_w2",
    "w2_a": r"\.lokr_w2_a",
    "w2_b": r"\.lokr_w2_b",
    "hada_w1_a": r"\.hada_w1_a",
    "hada_w1_b": r"\.hada_w1_b",
    "hada_w2_a": r"\.hada_w2_a",
    "hada_w2_b": r"\.hada_w2_b",
    "diff": r"\.(diff|w_norm)",
    "diff_b": r"\.(diff_b|b_norm)",
    "set_weight": r"\.set_weight",
}
_PARTS = [(part, re.compile(rf"(?P<path>.+?){pattern}")) for part, pattern in PARTS.items()]
# Kinds that are not supported, by the ends of their keys.
UNSUPPORTED = {
    "OFT or BOFT": re.compile(r"\.(oft|boft)_\w+|\.oft_R(\.\w+)?\.weight"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight"),
    "a Tucker decomposition": re.compile(r"\.(lokr_t2|hada_t[12]|lora_mid(\.weight)?)"),
    "a LoRA with biases": re.compile(r"[._]lora_[AB](\.\w+)??\.bias"),
}
# What a file that is not a LoRA for Z-Image may be, by a name that most of its keys contain.
LOOKS_LIKE = {
    "a LoRA for Flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
    "a LoRA for SDXL or SD 1.5": re.compile(r"down_blocks|up_blocks|input_blocks|output_blocks|lora_te[12]_text_model"),
    "a LoRA for Qwen-Image": re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
    "a LoRA for SD3": re.compile(r"joint_blocks|transformer_blocks[._]\d+[._](ff_context|attn[._]add_)"),
    "a LoRA for Wan": re.compile(r"blocks[._]\d+[._](cross_attn|ffn[._]\d)"),
    "a ControlNet": re.compile(r"(^|\.)control(net)?_"),
    "the text encoder's part of a LoRA for another model": re.compile(r"^(lora_te|text_encoder|te\d?\.)"),
}


class Names:
    """Every spelling of the layers of some networks, "." written as "_", and the layers they stand for.

    A Place names a layer here, without ".weight", and the rows of a stored difference that belong to it.
    """

    def __init__(self, configs: Mapping[str, NetworkConfig]):
        self.shapes = {network: config.shapes() for network, config in configs.items()}
        self._own: dict[str, list[Place]] = {}
        self._alias: dict[str, list[Place]] = {}
        for network, shapes in self.shapes.items():
            for name in shapes:
                layer, _, kind = name.rpartition(".")
                layer = layer if kind in ("weight", "bias") else name
                self._own.setdefault(_flat(layer), [Place(network, layer)])
                if network == "text_encoder":
                    self._alias.setdefault(_flat(layer.removeprefix("model.")), [Place(network, layer)])
        for network, shapes in self.shapes.items():
            fused: dict[str, list[str]] = {}
            for name in shapes:
                if name.endswith(".weight"):
                    foreign = comfyui_name(network, name).removesuffix(".weight")
                    fused.setdefault(_flat(foreign), []).append(name.removesuffix(".weight"))
            for flat, layers in fused.items():
                if flat not in self._own:
                    self._alias[flat] = [Place(network, x, i, len(layers)) for i, x in enumerate(layers)]

    def find(self, path: str) -> tuple[list[Place], bool]:
        """The targets of a layer's path in any spelling, and whether it is the layer's own name; [] if unknown."""
        flat = _flat(path)
        while True:
            if flat in self._own:
                return self._own[flat], True
            if flat in self._alias:
                return self._alias[flat], False
            prefix = PREFIX.match(flat)
            if not prefix:
                return [], False
            flat = flat[prefix.end() :]

    def shape(self, target: Place) -> tuple[int, ...]:
        """The shape of a layer's weight, or of the tensor itself where it is not a layer."""
        shapes = self.shapes[target.component]
        return shapes.get(f"{target.name}.weight") or shapes[target.name]


def _flat(path: str) -> str:
    return path.replace(".", "_")


def find_lora(source: str | Path) -> Path:
    """The file (or PEFT folder) of a LoRA: a path, a Hugging Face id, or id:file where a repository has several."""
    path = Path(os.path.expanduser(source))
    if str(source) and path.exists():
        return check_name(path)
    repository_id, _, name = str(source).partition(":")
    if not REPOSITORY_ID.fullmatch(repository_id):
        raise ModelNotFoundError(
            f"no LoRA at {source or repr(source)}; expected a safetensors file, a Hugging Face id, or id:file"
        )
    repository = Repository(repository_id)
    files = {str(file.relative_to(repository.folder)): file for file in repository.matching(["*.safetensors"])}
    if name and name not in files:
        raise ModelNotFoundError(
            f"{repository_id} has no {name}; it has {', '.join(sorted(files)) or 'no safetensors'}"
        )
    if not name and len(files) != 1:
        listed = "; ".join(f"{repository_id}:{other}" for other in sorted(files))
        wanted = f"choose one: {listed}" if listed else "expected one"
        raise ModelNotFoundError(f"{repository_id} has {len(files)} safetensors files; {wanted}")
    file = files[name or next(iter(files))]
    config = file.parent / "adapter_config.json"
    repository.fetch([file, *(path for path in repository.sizes if path == config)])
    return file.parent if file.name == ADAPTER and config.exists() else file


def name_of_lora(file: Path) -> str:
    """What to call a LoRA without saying where it is: the name of its file, or of its PEFT folder."""
    return file.name if file.is_dir() else (file.parent.name if file.name == ADAPTER else file.stem)


@dataclass(frozen=True)
class Lora:
    """A LoRA file that has been read: its differences by network and weight, and how it was made, if known.

    deltas has each network's differences by the weight's name in the checkpoint. ignored are keys that carry nothing:
    fused copies of layers that the file also has one by one. metadata is the safetensors header's.
    """

    file: Path
    sha256: str
    deltas: Mapping[str, Mapping[str, Delta]]
    ignored: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    dialect: str = ""


@dataclass(frozen=True)
class _Scaling:
    """Scales from outside the tensors: PEFT's config, in the safetensors header or beside the file."""

    alpha: float | None  # for layers that have none of their own; None is their rank
    rank: float | None  # of whole LoKr factors; others have it in their shapes
    alphas: Mapping[str, float]  # by how a layer's path ends; the first that fits applies
    ranks: Mapping[str, float]
    by_root: bool  # whether to divide by the square root of the rank

    @classmethod
    def of(cls, file: Path, config: Mapping) -> _Scaling:
        """PEFT's config, checked: patterns may be names only, since an untrusted regular expression may never end."""

        def number(name: str, value: Any) -> float:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CheckpointError(f"{file}: the LoRA's {name} must be a number, got {brief(value)}")
            return float(value)

        def by_layer(pattern: str, name: str) -> dict[str, float]:
            found = config.get(pattern) or {}
            if not isinstance(found, dict):
                raise CheckpointError(f"{file}: {pattern} must be an object, got {brief(found)}")
            names = {key.removeprefix("^").removesuffix("$").replace("\\.", "."): key for key in found}
            for layer in names:
                if not re.fullmatch(r"[\w.-]+", layer):
                    raise CheckpointError(f"{file}: the keys of {pattern} must be layer names, got {brief(layer)}")
            return {layer: number(name, found[key]) for layer, key in names.items()}

        alpha = config.get("alpha" if "alpha" in config else "lora_alpha")  # LoKr's and LoHa's, and LoRA's
        return cls(
            None if alpha is None else number("alpha", alpha),
            None if config.get("r") is None else number("rank", config["r"]),
            by_layer("alpha_pattern", "alpha"),
            by_layer("rank_pattern", "rank"),
            bool(config.get("use_rslora")),
        )

    def scale(self, path: str, rank: float | None, alpha: float | None) -> float:
        """The factor of the difference of the layer at this path.

        rank is that of its factors, None if they are whole; alpha the one stored beside them, if any. Beside whole
        factors it means nothing, and ai-toolkit stores 9999999999.
        """
        if alpha is None:
            alpha = _fitting(self.alphas, path, self.alpha)
            rank = rank or _fitting(self.ranks, path, self.rank)
        if not rank:
            return 1.0
        return (rank if alpha is None else alpha) / (rank**0.5 if self.by_root else rank)


def _fitting(by_layer: Mapping[str, float], path: str, default: float | None) -> float | None:
    return next((value for layer, value in by_layer.items() if f".{path}".endswith(f".{layer}")), default)


def read_lora(file: Path, configs: Mapping[str, NetworkConfig], partial: bool = False, headers: bool = False) -> Lora:
    """Read a LoRA's safetensors file (or PEFT folder) for networks of these configs, in any dialect.

    Every key must belong to a difference of a known weight, with factors that fit it and numbers that are finite;
    otherwise CheckpointError names what does not. partial=True leaves out keys that match no layer, but at least one
    key must match; they are listed in `unmatched`.

    headers=True is for planning: it reads as little of the file as the shapes of its differences need, so that numbers
    that are not finite may go unnoticed, and computes no checksum.
    """
    config: dict | None = None
    if file.is_dir():
        peft, file = file, file / ADAPTER
        check_inside(peft, [file, _config_in(peft)])
        config = read_json(_config_in(peft))
    _refuse_pickles(file)
    entries = read_header(file)
    _check_entries(file, entries)
    metadata = read_metadata(file)
    scaling = _Scaling.of(file, _header_config(file, metadata) if config is None else config)
    names = Names(configs)
    _check_sizes(file, entries, [math.prod(shape) for shapes in names.shapes.values() for shape in shapes.values()])
    layers, unknown = _group(file, entries)
    _refuse_kinds(file, unknown, len(entries))
    found: dict[str, tuple[list[Place], bool]] = {path: names.find(path) for path in layers}
    lost = [key for path, (targets, _) in found.items() if not targets for key in layers[path].values()]
    unmatched = sorted(unknown + lost)
    _check_matched(file, unmatched, len(entries), partial)

    own = {(t.component, t.name) for targets, exact in found.values() if exact for t in targets}
    deltas: dict[str, dict[str, Delta]] = {network: {} for network in configs}
    ignored: list[str] = []
    with unchanged(entries.values()):
        arrays: Any = mx.load(str(file), format="safetensors")  # whatever it is called
        for path, (targets, exact) in found.items():
            keys = layers[path]
            if targets and not exact and all((t.component, t.name) in own for t in targets):
                ignored += keys.values()
                continue
            if not headers:
                mx.eval([arrays[key] for key in keys.values()])  # see `Weights.read`
            for target in targets:
                for kind, delta in _deltas(file, path, keys, arrays, scaling, names, target):
                    name = _weight_name(target.name, kind, names.shapes[target.component])
                    if name in deltas[target.component]:
                        raise CheckpointError(f"{file}: {path} is a second difference for {name}; expected only one")
                    if not headers and not is_finite(delta):
                        raise CheckpointError(
                            f"{file}: {path} has numbers that are not finite; download or train it again"
                        )
                    deltas[target.component][name] = delta
        checksum = "" if headers else sha256(file)
    read = {network: found for network, found in deltas.items() if found}
    return Lora(file, checksum, read, tuple(sorted(ignored)), tuple(unmatched), metadata, _dialect(entries))


def _check_entries(file: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse a file with too many tensors or none, with empty ones, or with numbers that are not weights."""
    if not entries:
        raise CheckpointError(f"{file} has no tensors; download or train it again")
    if len(entries) > MAX_LORA_TENSORS:
        raise CheckpointError(
            f"{file} has {len(entries):,} tensors, expected at most {MAX_LORA_TENSORS:,}; is it a LoRA?"
        )
    for name, entry in entries.items():
        if entry.dtype not in FLOAT_SPELLINGS and not (name.endswith(".alpha") and entry.shape in ((), (1,))):
            raise CheckpointError(f"{file}: {name} is {entry.dtype}, expected one of {', '.join(FLOAT_SPELLINGS)}")
        if 0 in entry.shape or (name.endswith(".alpha") and math.prod(entry.shape) != 1):
            raise CheckpointError(f"{file}: {name} has shape {entry.shape}; the file is incomplete")


def _header_config(file: Path, metadata: Mapping[str, str]) -> dict:
    """PEFT's config as diffusers saves it: JSON in the header's lora_adapter_metadata, keys prefixed by the network."""
    text = metadata.get(HEADER_CONFIG)
    if text is None:
        return {}
    try:
        stored = parse_json(text)
        return {key.removeprefix("transformer."): value for key, value in stored.items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: {HEADER_CONFIG} is not a JSON object ({error})") from error


def _check_sizes(file: Path, entries: Mapping[str, Entry], weights: Sequence[int]) -> None:
    """Refuse tensors that are larger than any weight of the model, or together larger than all of it: sparse files may
    claim terabytes.

    weights has the size of each of the model's weights, as a number of values.
    """
    sizes = {name: math.prod(entry.shape) for name, entry in entries.items()}
    for name, numbers in sizes.items():
        if numbers > max(weights):
            raise CheckpointError(
                f"{file}: {name} has {numbers:,} values, more than the model's largest weight ({max(weights):,}); is "
                f"it a LoRA for this model?"
            )
    if sum(sizes.values()) > sum(weights):
        raise CheckpointError(
            f"{file} has {sum(sizes.values()):,} values, more than the whole model ({sum(weights):,}); is it a LoRA "
            f"for this model?"
        )


def _config_in(folder: Path) -> Path:
    """The config in a PEFT folder; for any other folder, CheckpointError lists the files in it."""
    config = folder / "adapter_config.json"
    if config.is_file():
        return config
    files = sorted(path.name for path in folder.glob("*.safetensors") if not is_hidden(path.name))
    listed = some(files)
    raise CheckpointError(
        f"{folder} is a folder without adapter_config.json, so it is not a PEFT folder; expected a LoRA file"
        + (f", such as one of those inside: {listed}" if files else "")
    )


def _refuse_pickles(file: Path) -> None:
    try:
        with open_regular(file) as stream:
            start = stream.read(4)
    except FileNotFoundError:
        raise CheckpointError(f"no LoRA at {file}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05") or start == b"PK\x03\x04":
        raise CheckpointError(f"{file} is a PyTorch pickle, which can run code when it is opened; expected safetensors")


def _group(file: Path, keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of each layer's path by the part that they hold, and the keys that hold no known part."""
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for key in sorted(keys):
        match = next(((part, m) for part, pattern in _PARTS if (m := pattern.fullmatch(key))), None)
        if match:
            part, parts = match[0], layers.setdefault(match[1]["path"], {})
            if part in parts:
                raise CheckpointError(
                    f"{file}: {parts[part]} and {key} are the same part of one layer; expected only one"
                )
            parts[part] = key
        else:
            unknown.append(key)
    return layers, unknown


def _refuse_kinds(file: Path, unknown: list[str], total: int) -> None:
    for kind, pattern in UNSUPPORTED.items():
        names = [key for key in unknown if pattern.search(key)]
        if names:
            raise CheckpointError(
                f"{file}: {kind} is not supported ({len(names)} of {total} keys, the first is {names[0]!r}); "
                "only LoRA, LoKr, LoHa, DoRA and plain differences are"
            )


def _check_matched(file: Path, unmatched: list[str], total: int, partial: bool) -> None:
    if not unmatched or (partial and len(unmatched) < total):
        return
    if any(pattern.fullmatch(key) for key in unmatched for _, pattern in _PARTS):
        kinds = LOOKS_LIKE
    else:
        kinds = {"a ControlNet": LOOKS_LIKE["a ControlNet"], "a full checkpoint": re.compile("")}
    looks = next(
        (kind for kind, names in kinds.items() if sum(bool(names.search(key)) for key in unmatched) * 2 > total), ""
    )
    partly = "; --lora-partial (partial=True in Python) applies the others"
    advice = "" if len(unmatched) == total else partly
    looks = f" (it looks like {looks})" if looks else ""
    match = "matches" if len(unmatched) == 1 else "match"
    raise CheckpointError(
        f"{file}: {len(unmatched)} of {total} keys {match} no layer of Z-Image{looks}: {some(unmatched)}{advice}"
    )


def _weight_name(layer: str, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return layer if layer in shapes else f"{layer}.{kind}"


def _deltas(
    file: Path, path: str, keys: Mapping[str, str], arrays: Mapping[str, mx.array], scaling: _Scaling, names: Names,
    target: Place,
) -> Iterator[tuple[str, Delta]]:  # fmt: skip
    """("weight" or "bias", its difference) of one target, checked: whole, and of the weight's shape."""
    parts: dict[str, Any] = {part: arrays[key] for part, key in keys.items()}
    expected = names.shape(target)
    stored = (expected[0] * target.parts, *expected[1:])
    alpha = float(parts.pop("alpha").item()) if "alpha" in parts else None
    magnitude = parts.pop("magnitude", None)
    bias = parts.pop("diff_b", None)
    delta = _weight_delta(file, path, parts, alpha, scaling)
    if magnitude is not None:
        if delta is None:
            raise CheckpointError(f"{file}: {path} has a DoRA magnitude but no factors; the file is incomplete")
        if len(stored) != 2:
            raise CheckpointError(
                f"{file}: {keys['magnitude']} belongs to a weight of shape {stored}; expected a matrix"
            )
        rows, columns = stored
        by_row = magnitude.shape in ((rows,), (rows, 1))
        if not by_row and magnitude.shape != (1, columns):
            raise CheckpointError(
                f"{file}: {keys['magnitude']} is {magnitude.shape}, expected ({rows}, 1) or (1, {columns})"
            )
        if not by_row and target.parts > 1:  # a column's length is that of all of its rows
            raise CheckpointError(
                f"{file}: {keys['magnitude']} has one length per column, shared by {target.parts} layers, so it "
                f"cannot be split between them; train or convert the LoRA with those layers separate"
            )
        delta = DoRA(delta, magnitude.reshape(-1, 1) if by_row else magnitude)
    found: list[tuple[str, Delta, tuple[int, ...]]] = []
    if delta is not None:
        found.append(("weight", delta, stored))
    if bias is not None:
        found.append(("bias", Dense(bias), stored[:1]))
    if not found:
        raise CheckpointError(f"{file}: {path} has only {', '.join(keys.values())}; the file is incomplete")
    for kind, each, shape in found:
        if tuple(each.shape) != shape:
            raise CheckpointError(
                f"{file}: the difference for {path} has shape {tuple(each.shape)}, but the model's {kind} has {shape}; "
                f"it was made for another model"
            )
        yield kind, each.rows(target.part, target.parts) if target.parts > 1 else each


# Names of dialects, for display: the first row that matches any key of the file. Reading does not depend on them.
DIALECTS = (
    ("LyCORIS (SimpleTuner)", re.compile(r"lycoris_")),
    ("OneTrainer, old", re.compile(r"lora_transformer_")),
    ("kohya (musubi-tuner)", re.compile(r"lora_unet_")),
    ("DiffSynth-Studio", re.compile(r"layers\..*\.lora_[AB]\.default\.weight")),
    ("PEFT", re.compile(r"base_model\.model\.")),
    ("diffusers", re.compile(r"transformer\.")),
    ("ComfyUI (ai-toolkit, mflux)", re.compile(r"diffusion_model\.")),
    ("dotted names", re.compile(r".*\.lora\.(up|down)\.")),
)


def _dialect(keys: Iterable[str]) -> str:
    return next((name for name, pattern in DIALECTS if any(pattern.match(key) for key in keys)), "bare names")


def _weight_delta(
    file: Path, path: str, parts: Mapping[str, mx.array], alpha: float | None, scaling: _Scaling
) -> Delta | None:
    """The difference of a layer's weight that these factors make; None if there are none."""

    def take(*names: str) -> list[mx.array]:
        missing = [name for name in names if name not in parts]
        if missing:
            raise CheckpointError(f"{file}: {path} has no {', '.join(missing)}; the file is incomplete")
        return [_matrix(parts[name]) for name in names]

    def product(name: str) -> tuple[mx.array, int | None]:
        """A LoKr factor, and its rank if it is stored as a product."""
        if name in parts:
            return take(name)[0], None
        a, b = take(f"{name}_a", f"{name}_b")
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise _misfit(file, path, a, b)
        return (a.astype(mx.float32) @ b.astype(mx.float32)), b.shape[0]

    kinds = [kind for kind, names in PARTS_OF_KIND.items() if names & parts.keys()]
    if len(kinds) > 1:
        raise CheckpointError(f"{file}: {path} has both {' and '.join(kinds)}; expected one kind")
    if not kinds:
        return None
    if kinds[0] == "LoRA":
        down, up = take("down", "up")
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise _misfit(file, path, up, down)
        return LowRank(down, up, scaling.scale(path, down.shape[0], alpha))
    if kinds[0] == "LoKr":
        (w1, rank1), (w2, rank2) = product("w1"), product("w2")
        if w1.ndim != 2 or w2.ndim != 2:
            raise _misfit(file, path, w1, w2)
        return Kronecker(w1, w2, scaling.scale(path, rank2 or rank1, alpha))
    if kinds[0] == "LoHa":
        factors = take("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        for a, b in (factors[:2], factors[2:]):
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.shape[0] != factors[0].shape[0]:
                raise _misfit(file, path, a, b)
        if factors[1].shape[1] != factors[3].shape[1]:
            raise _misfit(file, path, factors[1], factors[3])
        w1_a, w1_b, w2_a, w2_b = factors
        return Hadamard(w1_a, w1_b, w2_a, w2_b, scaling.scale(path, len(w1_b), alpha))
    if kinds[0] == "a difference":
        return Dense(parts["diff"])
    return Replacement(parts["set_weight"])


PARTS_OF_KIND = {
    "LoRA": {"down", "up"},
    "LoKr": {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "a difference": {"diff"},
    "a weight": {"set_weight"},
}


def _matrix(array: mx.array) -> mx.array:
    """A factor as a matrix: that of a 1x1 convolution has two more axes, of length 1."""
    return array.squeeze(axis=(2, 3)) if array.ndim == 4 and array.shape[2:] == (1, 1) else array


def _misfit(file: Path, path: str, a: mx.array, b: mx.array) -> CheckpointError:
    return CheckpointError(f"{file}: the factors of {path} do not fit together: {a.shape} and {b.shape}")


# ---- for display


TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "ss_trigger_words", "instance_prompt")


def describe(lora: Lora) -> dict:
    """What a LoRA contains, ready for JSON. An alpha is a scale times its rank, whether the file has it or not."""
    networks = {
        network: dict(Counter(type(delta).__name__ for delta in deltas.values()))
        for network, deltas in lora.deltas.items()
    }
    inner = [getattr(delta, "inner", delta) for deltas in lora.deltas.values() for delta in deltas.values()]
    ranks = sorted({delta.rank for delta in inner if isinstance(delta, LowRank)})
    alphas = sorted({round(float(delta.scale * delta.rank), 6) for delta in inner if isinstance(delta, LowRank)})
    scales = sorted({round(float(delta.scale), 6) for delta in inner if hasattr(delta, "scale")})
    return {
        "file": lora.file.name,
        "sha256": lora.sha256,
        "dialect": lora.dialect,
        "networks": networks,
        "ranks": ranks,
        "alphas": alphas,
        "scales": scales,
        "targets": sorted({name for deltas in lora.deltas.values() for name in deltas}),
        "trigger_words": [lora.metadata[key] for key in TRIGGERS if lora.metadata.get(key)],
        "ignored": list(lora.ignored),
        "unmatched": list(lora.unmatched),
    }
