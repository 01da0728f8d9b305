"""Have mflux save a tiny model with its own code, and keep the folders in mflux.zip.

    pip install mflux==0.24.0; python tests/golden/mflux_folders.py

A diffusers folder with the weights below is read, renamed, quantized and saved entirely by mflux's code: WeightLoader,
ZImageWeightMapping, WeightApplier, ModelSaver. Only its networks are made smaller; its VAE has no configurable sizes,
so a small one is assembled from mflux's blocks. The weights repeat, so they compress well.
"""

import sys
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

ARCHIVE = Path(__file__).with_name("mflux.zip")
BITS = (None, 8, 4)
PERIOD = 251
WIDTH = 64  # block widths of the VAE's blocks
CONFIGS = {
    "transformer": tiny.TRANSFORMER
    | {"dim": 192, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [8, 12, 12]}
    | {"cap_feat_dim": 64},
    "text_encoder": tiny.TEXT_ENCODER
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 300},
    "vae": tiny.VAE | {"block_out_channels": [WIDTH] * 4, "norm_num_groups": 32},
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small values that bfloat16 represents exactly and that identify their position: from (k * i + c) mod 251."""
    key = zlib.crc32(name.encode())
    k, c = 1 + key % (PERIOD - 1), key // PERIOD % PERIOD
    i = np.arange(np.prod(shape), dtype=np.int64)
    return (((k * i + c) % PERIOD - PERIOD // 2) / np.float32(1024)).astype(np.float32).reshape(shape)


def weights(component: str) -> dict[str, np.ndarray]:
    shapes = tiny.SHAPES[component](CONFIGS[component])
    return {name: weight(f"{component} {name}", shape) for name, shape in shapes.items()}


def small_vae():
    import mlx.nn as nn
    from mflux.models.z_image.model.z_image_vae.common.unet_mid_block import UNetMidBlock
    from mflux.models.z_image.model.z_image_vae.decoder import decoder as d
    from mflux.models.z_image.model.z_image_vae.encoder import encoder as e

    def module(**parts):
        made = nn.Module()
        for name, part in parts.items():
            setattr(made, name, part)
        return made

    down = [e.DownEncoderBlock(WIDTH, WIDTH, num_layers=2, add_downsample=i < 3) for i in range(4)]
    up = [d.UpDecoderBlock(WIDTH, WIDTH, num_layers=3, add_upsample=i < 3) for i in range(4)]
    return module(
        encoder=module(
            conv_in=e.ConvIn(in_channels=3, out_channels=WIDTH),
            down_blocks=down,
            mid_block=UNetMidBlock(channels=WIDTH),
            conv_norm_out=e.ConvNormOut(num_channels=WIDTH, num_groups=32),
            conv_out=e.ConvOut(in_channels=WIDTH, out_channels=32),
        ),
        decoder=module(
            conv_in=d.ConvIn(in_channels=16, out_channels=WIDTH),
            mid_block=UNetMidBlock(channels=WIDTH),
            up_blocks=up,
            conv_norm_out=d.ConvNormOut(channels=WIDTH),
            conv_out=d.ConvOut(in_channels=WIDTH, out_channels=3),
        ),
    )


def save(source: Path, dest: Path, bits: int | None) -> None:
    """The same as `mflux-save --model SOURCE --path DEST --quantize BITS`, with small networks."""
    from mflux.models.common.weights.loading.weight_applier import WeightApplier
    from mflux.models.common.weights.loading.weight_loader import WeightLoader
    from mflux.models.common.weights.saving.model_saver import ModelSaver
    from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
    from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition

    text, image = CONFIGS["text_encoder"], CONFIGS["transformer"]

    class Small(ZImageWeightDefinition):
        @staticmethod
        def get_components():
            layers = {"transformer": image["n_layers"], "text_encoder": text["num_hidden_layers"], "vae": None}
            return [replace(c, num_layers=layers[c.name]) for c in ZImageWeightDefinition.get_components()]

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = ("dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim", "axes_dims")
    models = {
        "vae": small_vae(),
        "transformer": ZImageTransformer(**{name: image[name] for name in sizes}),
        "text_encoder": TextEncoder(**{name: text[name] for name in (*names, "intermediate_size", "head_dim")}),
    }
    loaded = WeightLoader.load(weight_definition=Small, model_path=str(source))
    stored = WeightApplier.apply_and_quantize(loaded, models, bits, Small)
    ModelSaver.save_model(SimpleNamespace(**models), stored, str(dest), Small)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        for component, config in CONFIGS.items():
            tiny.save_component(source / component, component, weights(component), config)
        with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_LZMA) as archive:
            for bits in BITS:
                dest = Path(folder) / f"mflux-{bits or 'dense'}"
                save(source, dest, bits)
                for path in sorted(path for path in dest.rglob("*") if path.is_file()):
                    entry = zipfile.ZipInfo(
                        path.relative_to(folder).as_posix()
                    )  # without a date, for reproducible bytes
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_LZMA)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
