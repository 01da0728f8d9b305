"""The LoRAs of a pipeline: which files are loaded, under which names, and how strong each one is.

    pipe.load_lora("style.safetensors", name="style")
    pipe.set_loras({"style": 0.8})
    pipe.unload_lora("style")

A request may choose its own among the loaded ones, at its own strengths (`GenerateRequest.loras`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RequestError, warn
from .models.runner import NetworkConfig
from .needless import Elsewhere
from .request import LoraUse
from .untrusted import brief
from .weights.lora import Lora, find_lora, name_of_lora, read_lora
from .weights.overlay import Extra

if TYPE_CHECKING:
    from .networks import Networks
    from .turns import Turns


class LoraMethods:
    """A pipeline's methods for LoRAs: our own, and those of diffusers' pipelines."""

    networks: Networks
    turns: Turns
    _loras: dict[str, Lora]
    _strengths: dict[str, float]

    def load_lora(
        self, source: str | Path, name: str | None = None, strength: float = 1.0, partial: bool = False
    ) -> str:
        """Load a LoRA in any trainer's dialect and use it from the next request on; returns the name it goes by.

        source is a safetensors file, a PEFT folder, a Hugging Face id, or id:file. The name is the file's by default.
        Every key must match a layer of the model, or it raises CheckpointError; with partial=True, keys that do not are
        ignored with a warning. The weights of the model are not changed.
        """
        if not isinstance(source, (str, Path)):
            raise RequestError(f"a LoRA must be a file or a Hugging Face id, got {type(source).__name__}")
        path = find_lora(source)
        name = name_of_lora(path) if name is None else name
        use = LoraUse(name, strength)
        lora = read_lora(path, self._configs, partial)
        if lora.unmatched:
            warn(
                f"{path}: ignoring keys that match no layer ({len(lora.unmatched)} in all); the first is "
                f"{lora.unmatched[0]!r}"
            )
        for other, loaded in self._loras.items():
            if (other == name) != (loaded.sha256 == lora.sha256):
                raise RequestError(
                    f"{path} is already loaded as {other!r}; use that name"
                    if other != name
                    else f"another LoRA is loaded as {name!r}; give this one another name, or unload that one first"
                )
        with self.turns.computing(), self.networks.guarded():
            self.networks.attach(lora)
        self._loras[name] = lora
        self._strengths[name] = use.strength
        return name

    def lora_extras(self, files: Mapping[Path, float]) -> dict[str, Extra]:
        """What LoRA files at these strengths would add to the memory of each network, for `plan`, without loading them.

        May be called from another thread while a request is running. CheckpointError if a file is not a LoRA for this
        model.
        """
        read = {str(file): read_lora(file, self._configs, headers=True) for file in files}
        return self.networks.extras_of(read, {str(file): strength for file, strength in files.items()})

    @property
    def _configs(self) -> dict[str, NetworkConfig]:
        return {network: overlay.config for network, overlay in self.networks.overlays.items()}

    def set_loras(self, strengths: Mapping[str, float]) -> None:
        """Use loaded LoRAs at these strengths from the next request on, and no others. 1 is as trained, 0 is off."""
        if not isinstance(strengths, Mapping):
            raise RequestError(f"set_loras takes strengths by name, such as {{'style': 0.8}}, got {brief(strengths)}")
        self._check_loaded(strengths)
        self._strengths = {name: LoraUse(name, strength).strength for name, strength in strengths.items()}

    def unload_lora(self, name: str) -> None:
        """Unload a LoRA, and free its memory."""
        self._check_loaded([name])
        with self.turns.computing():
            self.networks.detach(self._loras.pop(name))
        self._strengths.pop(name, None)

    def _check_loaded(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        for name in names:
            if not isinstance(name, str) or name not in self._loras:
                loaded = ", ".join(map(repr, self._loras)) or "none"
                raise RequestError(f"no LoRA is loaded as {name!r} (loaded: {loaded}); load_lora loads one")

    # ---- the same under diffusers' names

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        **options: object,
    ) -> None:
        """diffusers' load_lora_weights: weight_name is the file in a folder or repository."""
        source = pretrained_model_name_or_path_or_dict
        if options:
            raise RequestError(
                f"load_lora_weights has no option {next(iter(options))!r} here; load_lora has partial=True"
            )
        if weight_name is not None and isinstance(source, (str, Path)):
            folder = Path(source).expanduser()
            source = folder / weight_name if folder.is_dir() else f"{source}:{weight_name}"
        self.load_lora(source, adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """diffusers' set_adapters: these LoRAs at these strengths, 1 by default, and no others."""
        names = _adapters(adapter_names)
        given = 1.0 if adapter_weights is None else adapter_weights
        weights = list(given) if isinstance(given, Sequence) else [given] * len(names)
        if len(weights) != len(names):
            raise RequestError(f"adapter_weights must have one value per adapter, got {len(weights)} for {len(names)}")
        self.set_loras(dict(zip(names, weights, strict=True)))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """diffusers' delete_adapters: unload these LoRAs."""
        for name in _adapters(adapter_names):
            self.unload_lora(name)

    def unload_lora_weights(self) -> None:
        """diffusers' unload_lora_weights: unload all LoRAs."""
        self.delete_adapters(list(self._loras))

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs that the next request uses."""
        return [name for name, strength in self._strengths.items() if strength]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of the loaded LoRAs, by network."""
        networks = self.networks.overlays
        found = {
            network: [name for name, lora in self._loras.items() if network in lora.deltas] for network in networks
        }
        return {network: names for network, names in found.items() if names}

    fuse_lora = Elsewhere(
        "LoRAs run beside the model's weights at little cost; `mlx-zimage fuse MODEL FOLDER --lora FILE` writes a "
        "model that has them in its weights"
    )
    unfuse_lora = Elsewhere("a pipeline never fuses LoRAs; unload_lora removes one")
    disable_lora = Elsewhere("use set_loras({})")
    enable_lora = Elsewhere("use set_loras({name: strength})")


def _adapters(names: object) -> list[str]:
    """The names of one or more adapters, as diffusers takes them."""
    found: list[Any] = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not all(isinstance(name, str) for name in found):
        raise RequestError(f"adapter_names must be a LoRA's name or a list of names, got {brief(names)}")
    return found
