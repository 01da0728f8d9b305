"""Write a checkpoint of Z-Image-Turbo's full size and official layout with random weights (33 GB, or 6.7 at 4 bits).

    python examples/full_size.py FOLDER [--dtype bfloat16] [--q-bits 4]

To try out memory, speed and conversion without the real weights: its images are noise, but every name, shape and dtype
is as published (the shards are smaller). With --dtype or --q-bits, it has the tensors that our converter would write.
The tokenizer is the pocket model's. One shard is in memory at a time.
"""

import json
import shutil
from pathlib import Path

import click
import mlx.core as mx

from mlx_zimage.dtypes import FLOATS
from mlx_zimage.models.layers import pack
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.quantization import MODES, Quantization
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.quantize import tensor_quantization

SHARD_BYTES = 2 * 10**9  # the published shards are 10 GB, which few machines could hold here
COMPONENTS = {  # component -> (architecture, dtype as published, name of the files)
    "transformer": (TransformerConfig(), mx.float32, "diffusion_pytorch_model"),
    "text_encoder": (TextEncoderConfig(), mx.bfloat16, "model"),
    "vae": (VAEConfig(), mx.bfloat16, "diffusion_pytorch_model"),
}
CONFIGS = {  # fields of the published configs beyond the architecture's own
    "transformer": {"all_patch_size": [2], "all_f_patch_size": [1], "n_kv_heads": 30, "qk_norm": True},
    "text_encoder": {"model_type": "qwen3", "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    "vae": {"in_channels": 3, "out_channels": 3, "force_upcast": True, "use_quant_conv": False},
}


def random_weight(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A weight that keeps activations near unit size: norms near one, matrices scaled by their input width."""
    if len(shape) == 1:
        return (mx.ones(shape) if name.endswith("weight") else mx.zeros(shape)).astype(dtype)
    fan_in = (
        1 if name.endswith(("pad_token", "embed_tokens.weight")) else shape[1] * (shape[2] ** 2 if shape[2:] else 1)
    )
    return (mx.random.normal(shape, dtype=mx.float32) * fan_in**-0.5).astype(dtype)


def write_component(
    folder: Path,
    component: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: mx.Dtype,
    stem: str,
    quantization: Quantization | None = None,
) -> None:
    """Write shards of about SHARD_BYTES and their index."""
    folder.mkdir(parents=True)
    weight_map, shard = {}, {}
    names = list(shapes)
    for name in names:
        weight, q = (
            random_weight(name, shapes[name], dtype),
            tensor_quantization(component, name, shapes[name], quantization),
        )
        shard |= pack(name, weight, q) if q else {name: weight}
        mx.eval(shard)
        if name == names[-1] or sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            file = f"{stem}-{len(set(weight_map.values())) + 1:05d}.safetensors"
            mx.save_safetensors(str(folder / file), shard, metadata={"format": "pt"})
            print(folder / file, flush=True)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(FLOATS), help="Data type of every tensor.  [default: as published]")
@click.option(
    "--q-bits",
    type=click.Choice(MODES["affine"][0]),
    help="Quantize the matrices of the blocks.  [default: not quantized]",
)
def main(folder: Path, dtype: str | None, q_bits: int | None) -> None:
    """Write the checkpoint into FOLDER, which must not exist yet."""
    if folder.exists():
        raise click.UsageError(f"{folder} already exists; name a new folder")
    quantization = None if q_bits is None else Quantization(q_bits)
    if quantization:
        dtype = dtype or "bfloat16"
    folder.mkdir(parents=True)
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    shutil.copytree(POCKET / "scheduler", folder / "scheduler")
    shutil.copy(POCKET / "model_index.json", folder)
    for name, (config, published, stem) in COMPONENTS.items():
        stored = getattr(mx, dtype) if dtype else published
        write_component(folder / name, name, config.shapes(), stored, stem, quantization)
        values = vars(config) | CONFIGS[name]
        if quantization and name != "vae":
            values["quantization"] = quantization.to_dict()
        (folder / name / "config.json").write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
