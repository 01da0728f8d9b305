"""Files in ComfyUI's quantized formats, of random codes, and their values: written here independently of the reader."""

import json
import re

import mlx.core as mx
import numpy as np

from mlx_zimage.convert.rows import FP8
from mlx_zimage.weights.checkpoint import open_checkpoint

FORMS = ("int8", "convrot", "w4a4", "w4a8", "nvfp4", "mxfp8")
F8_NAMES = {("mxfp8", "weight"), ("nvfp4", "weight_scale"), ("w4a8", "weight_s_rel")}


def blocked(scales):
    """Scales in the block layout of tensor cores, placed one by one, as its documentation describes."""
    rows, columns = scales.shape
    across = -(-columns // 4)
    out = np.zeros(-(-rows // 128) * across * 512, np.uint8)
    r, c = np.indices(scales.shape)
    out[(r // 128 * across + c // 4) * 512 + (r % 32) * 16 + r % 128 // 32 * 4 + c % 4] = scales
    return out.reshape(-(-rows // 128) * 128, across * 4)


def hadamard(size):
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    return h4 if size == 4 else np.kron(h4, hadamard(size // 4))


def turned(rows, size):
    return (rows.reshape(-1, size) @ hadamard(size)).reshape(rows.shape)


def nibbles(codes, high_first=False):
    first, second = codes[:, 0::2], codes[:, 1::2]
    return ((first << 4) | second if high_first else first | (second << 4)).astype(np.uint8)


def random_layer(form, rows, columns, rng):
    """A layer's settings, its tensors, and its values in float64."""
    finite = np.flatnonzero(np.isfinite(FP8["F8_E4M3"]))
    scale = (rng.random(rows, np.float32) + 0.5) * 2**-10
    if form == "int8":
        codes = rng.integers(-128, 128, (rows, columns), np.int8)
        return {"format": "int8_tensorwise"}, {"weight": codes, "weight_scale": scale[:1]}, codes * float(scale[0])
    if form == "convrot":
        codes = rng.integers(-128, 128, (rows, columns), np.int8)
        settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
        return (
            settings,
            {"weight": codes, "weight_scale": scale[:, None]},
            turned(codes * np.float64(scale)[:, None], 64),
        )
    if form == "w4a4":
        codes = rng.integers(-8, 8, (rows, columns))
        packed = nibbles(codes & 15).view(np.int8)
        settings = {"format": "convrot_w4a4", "params": {"convrot_groupsize": 16}}
        return settings, {"weight": packed, "weight_scale": scale}, turned(codes * np.float64(scale)[:, None], 16)
    if form == "w4a8":
        codes, relative = rng.integers(0, 16, (rows, columns)), rng.integers(64, 112, (rows, columns // 16), np.uint8)
        book = np.sort(rng.standard_normal(16, np.float32))
        levels = (book[codes].reshape(rows, -1, 16) * FP8["F8_E4M3"][relative][..., None]).reshape(rows, columns)
        values = np.clip(np.round(levels), -127, 127) * np.float64(scale)[:, None]
        tensors = {"weight": nibbles(codes).view(np.int8), "weight_s_rel": relative}
        tensors |= {"weight_s_channel": scale, "weight_codebook": book}
        return {"format": "asym_w4a8_int8", "convrot_groupsize": 64}, tensors, turned(values, 64)
    if form == "nvfp4":
        codes, overall = rng.integers(0, 16, (rows, columns)), np.float32(2**-12 * 1.1)
        scales = rng.choice(finite, (rows, columns // 16)).astype(np.uint8)
        fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        each = np.repeat(FP8["F8_E4M3"][scales] * overall, 16, axis=1)
        tensors = {"weight": nibbles(codes, high_first=True), "weight_scale": blocked(scales)}
        return {"format": "nvfp4"}, tensors | {"weight_scale_2": np.array(overall)}, fp4[codes] * np.float64(each)
    assert form == "mxfp8"
    codes = rng.choice(finite, (rows, columns)).astype(np.uint8)
    powers = rng.integers(100, 120, (rows, columns // 32), np.uint8)
    values = FP8["F8_E4M3"][codes] * np.repeat(2.0 ** (powers.astype(int) - 127), 32, axis=1)
    return {"format": "mxfp8"}, {"weight": codes, "weight_scale": blocked(powers)}, values


def save(path, tensors, metadata=None, shapes=None):
    """Write a safetensors file of NumPy arrays; other dtypes are given as (dtype, bytes), and their shapes
    separately."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    content, size = [], 0
    names = {"float32": "F32", "int8": "I8", "uint8": "U8", "uint32": "U32"}
    for name, array in tensors.items():
        dtype, array = array if isinstance(array, tuple) else (names[str(array.dtype)], array)
        end = size + array.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list((shapes or {}).get(name, array.shape)),
            "data_offsets": [size, end],
        }
        content.append(array.tobytes())
        size = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content))
    return path


def comfy_names(tensors):
    """A transformer's tensors with ComfyUI's names, in the opposite direction to the converter."""
    out = {}
    for name, array in tensors.items():
        name = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", name)
        name = name.replace(".to_out.0.", ".out.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
        if name.endswith("attention.to_q.weight"):
            stem = name.removesuffix("to_q.weight")
            out[f"{stem}qkv.weight"] = mx.concatenate([tensors[f"{stem}to_{x}.weight"] for x in "qkv"])
        elif not re.search(r"attention\.to_[kv]\.weight", name):
            out[name] = array
    return out


def pocket_tensors():
    """The pocket transformer with ComfyUI's names, float32."""
    entries = open_checkpoint("pocket").transformer.entries
    loaded = mx.load(str(next(iter(entries.values())).file))
    named = comfy_names({name: loaded[entry.name].astype(mx.float32) for name, entry in entries.items()})
    return {name: np.array(array) for name, array in named.items()}


def mixed(path, marked="tensors", prefix="", forms=FORMS, seed=0):
    """A transformer with its layers in all formats in turn, of random codes; returns the file and its values."""
    rng = np.random.default_rng(seed)
    tensors, values, layers = {}, {}, {}
    dense = pocket_tensors()
    own = [name for name in dense if re.search(r"(qkv|out|w[123])\.weight$", name)]
    for name, array in dense.items():
        if name not in own:
            tensors[prefix + name] = values[name] = array
            continue
        form, layer = forms[own.index(name) % len(forms)], prefix + name.removesuffix(".weight")
        settings, parts, values[name] = random_layer(form, *array.shape, rng)
        layers[layer] = settings
        for part, content in parts.items():
            tensors[f"{layer}.{part}"] = ("F8_E4M3", content) if (form, part) in F8_NAMES else content
        if marked == "tensors":
            tensors[f"{layer}.comfy_quant"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
        tensors[f"{layer}.input_scale"] = np.ones((), np.float32)
    if marked == "without prefix":
        layers = {layer.removeprefix(prefix): settings for layer, settings in layers.items()}
    listed = None if marked == "tensors" else {"_quantization_metadata": json.dumps({"layers": layers})}
    return save(path, tensors, listed), values


def split(file, folder):
    """Write the tensors of a file marked by metadata as two shards with an index; each shard lists its own layers."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    listed = json.loads(header.pop("__metadata__")["_quantization_metadata"])["layers"]
    layers = sorted({name.rpartition(".")[0] for name in header})
    index = {}
    for i, own in enumerate((layers[::2], layers[1::2]), 1):
        names = [name for name in header if name.rpartition(".")[0] in own]
        ranges = {name: slice(*(start + at for at in header[name]["data_offsets"])) for name in names}
        tensors = {name: (header[name]["dtype"], np.frombuffer(content[ranges[name]], np.uint8)) for name in names}
        metadata = json.dumps({"layers": {layer: listed[layer] for layer in own if layer in listed}})
        shapes = {name: header[name]["shape"] for name in names}
        shard = f"model-0000{i}-of-00002.safetensors"
        save(folder / shard, tensors, {"_quantization_metadata": metadata}, shapes)
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def renamed(values):
    """Values by diffusers' names, with queries, keys and values apart."""
    out = {}
    for name, array in values.items():
        name = re.sub(r"^(x_embedder|final_layer)\.", r"all_\1.2-1.", name)
        name = name.replace(".out.", ".to_out.0.").replace(".q_norm.", ".norm_q.").replace(".k_norm.", ".norm_k.")
        if name.endswith("qkv.weight"):
            for x, part in zip("qkv", np.split(array, 3), strict=True):
                out[name.replace("qkv", f"to_{x}")] = part
        else:
            out[name] = array
    return out
