"""Checkpoints in other formats give the same weights as the diffusers folder they were made from."""

import json
import re
import shutil
import struct
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from comfyui_files import comfy_names
from lanes import slow

from mlx_zimage import ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.convert import convert, gguf
from mlx_zimage.convert.rows import FP8
from mlx_zimage.convert.sources import BorrowedFromHub, open_source
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError, ModelNotFoundError, RequestError
from mlx_zimage.models import NETWORKS
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.weights import official
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.names import places

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import mflux_folders


def pocket(component):
    """The pocket model's tensors by diffusers name, as stored: bfloat16."""
    entries = getattr(open_checkpoint("pocket"), component).entries
    loaded = {file: mx.load(str(file)) for file in {entry.file for entry in entries.values()}}
    return {name: loaded[entry.file][entry.name] for name, entry in entries.items()}


def read(source, component):
    """All tensors of a network in a source, float32."""
    return {
        tensor.name: np.array(tensor.read(0, tensor.shape[0]).astype(mx.float32))
        for tensor in source.components[component].tensors
    }


def assert_same(source, component, bound=0.0):
    """Equal to the pocket model, within bound times the largest value of each row."""
    expected, got = pocket(component), read(source, component)
    assert list(got) == list(getattr(open_checkpoint("pocket"), component).config.shapes())
    for name in expected:
        exact = np.array(expected[name].astype(mx.float32))
        assert got[name].shape == exact.shape, name
        allowed = bound * np.abs(exact).max(-1, keepdims=True)
        assert (np.abs(got[name] - exact) <= allowed).all(), name


# ---- ComfyUI's and LDM's names, implemented here independently, in the opposite direction to the converter


def comfy_transformer(tensors):
    return comfy_names(tensors) | {"norm_final.weight": mx.ones((192,))}


def ldm_vae(tensors):
    out = {}
    for name, array in tensors.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        if "attentions.0" in name:
            if name.endswith("weight") and "group_norm" not in name:
                array = array.reshape(*array.shape, 1, 1)
            name = re.sub(r"mid_block\.attentions\.0\.(to_)?", "mid.attn_1.", name)
            name = name.replace("group_norm", "norm").replace("out.0", "proj_out")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        out[name] = array
    return out


def save(path, tensors):
    mx.save_safetensors(str(path), tensors)
    return path


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The three files that ComfyUI uses."""
    folder = tmp_path_factory.mktemp("split")
    save(folder / "dit.safetensors", comfy_transformer(pocket("transformer")))
    save(folder / "qwen.safetensors", pocket("text_encoder"))
    save(folder / "ae.safetensors", ldm_vae(pocket("vae")))
    return folder


def test_three_comfyui_files_equal_the_diffusers_folder(split, tmp_path):
    parts = {"text_encoder": split / "qwen.safetensors", "vae": split / "ae.safetensors"}
    source = open_source(split / "dit.safetensors", **parts, base="pocket")
    for component in NETWORKS:
        assert_same(source, component)
    out = convert(split / "dit.safetensors", tmp_path / "out", **parts, base="pocket")
    expected = convert("pocket", tmp_path / "expected")
    for path in expected.rglob("*"):
        if path.is_file() and path.name not in ("SHA256SUMS", "conversion.json", "generation_config.json"):
            assert (out / path.relative_to(expected)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("network_prefix", ["model.diffusion_model.", slow("diffusion_model."), slow("")])
def test_an_all_in_one_file_contains_everything(tmp_path, network_prefix):
    tensors = {f"{network_prefix}{name}": array for name, array in comfy_transformer(pocket("transformer")).items()}
    tensors |= {f"text_encoders.qwen3_4b.transformer.{name}": a for name, a in pocket("text_encoder").items()}
    tensors |= {f"vae.{name}": array for name, array in ldm_vae(pocket("vae")).items()}
    tensors["text_encoders.qwen3_4b.logit_scale"] = mx.array([4.6])
    source = open_source(save(tmp_path / "all.safetensors", tensors), base="pocket")
    for component in NETWORKS:
        assert_same(source, component)


def test_a_single_file_can_use_diffusers_names(tmp_path):
    tensors = {f"model.diffusion_model.{name}": array for name, array in pocket("transformer").items()}
    assert_same(open_source(save(tmp_path / "dit.safetensors", tensors), base="pocket"), "transformer")


@pytest.mark.slow
def test_the_converter_in_diffusers_agrees_about_comfyui_names(split):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")

    def to_torch(file):
        return {n: torch.from_numpy(np.array(a.astype(mx.float32))) for n, a in mx.load(str(split / file)).items()}

    theirs = single_file.convert_z_image_transformer_checkpoint_to_diffusers(to_torch("dit.safetensors"))
    ours = read(open_source(split / "dit.safetensors", base="pocket"), "transformer")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].numpy(), ours[name]) for name in ours)
    config = open_checkpoint("pocket").vae.raw_config
    theirs = single_file.convert_ldm_vae_checkpoint(to_torch("ae.safetensors"), config)
    ours = read(open_source(split / "dit.safetensors", vae=split / "ae.safetensors", base="pocket"), "vae")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].numpy().reshape(ours[name].shape), ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("component", "config"),
    [("transformer", TransformerConfig()), ("text_encoder", TextEncoderConfig()), ("vae", VAEConfig())],
)
def test_diffusers_names_of_the_full_model_are_unchanged(component, config):
    for name in config.shapes():
        (place,) = places(name)
        assert (place.component, place.name, place.parts) == (component, name, 1)
        (again,) = places(place.name)
        assert again == place


@pytest.mark.parametrize("component", NETWORKS)
def test_the_built_in_configs_equal_the_architectures_defaults(component):
    architecture = NETWORKS[component]
    assert architecture.from_dict(official.CONFIGS[component]) == architecture()


# ---- fp8


@pytest.mark.parametrize(("dtype", "bound"), [("float8_e4m3fn", 2.0**-4), ("float8_e5m2", 2.0**-3)])
@pytest.mark.parametrize("spelling", ["plain", "scale_weight", "weight_scale", "weight_scale rows"])
def test_fp8_weights_written_by_torch_are_read_back(tmp_path, dtype, bound, spelling):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors, exact = {}, {}
    for name, array in comfy_transformer(pocket("transformer")).items():
        weight = torch.from_numpy(np.array(array.astype(mx.float32)))
        if not re.search(r"attention\.(qkv|out)|feed_forward", name):
            tensors[name] = exact[name] = weight.to(torch.bfloat16)
            continue
        kept, per_row = spelling.partition(" ")[::2]
        scale = weight.abs().amax(1, keepdim=True) / 448 if per_row else weight.abs().max() / 448
        scale = torch.ones(()) if spelling == "plain" else scale
        tensors[name] = (weight / scale).to(getattr(torch, dtype))
        exact[name] = tensors[name].to(torch.float32) * scale
        layer = name.removesuffix(".weight")
        if spelling != "plain":
            tensors[f"{layer}.{kept}"] = scale
        if kept == "scale_weight":
            tensors[f"{layer}.scale_input"] = torch.ones(())
            tensors["scaled_fp8"] = torch.empty((0,), dtype=getattr(torch, dtype))
        if kept == "weight_scale":
            mark = json.dumps({"format": dtype}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    save_file(tensors, tmp_path / "fp8.safetensors")
    source = open_source(tmp_path / "fp8.safetensors", base="pocket")
    got = read(source, "transformer")
    for i, x in enumerate("qkv"):
        expected = exact["layers.2.attention.qkv.weight"].float().chunk(3)[i].numpy()
        assert np.array_equal(got[f"layers.2.attention.to_{x}.weight"], expected)
    assert np.array_equal(got["layers.0.feed_forward.w2.weight"], exact["layers.0.feed_forward.w2.weight"].numpy())
    assert_same(
        source, "transformer", bound
    )  # half a unit in the last place of the mantissa, or the loss where fp8 saturates


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_every_fp8_byte_has_the_same_value_as_in_torch(name, dtype):
    torch = pytest.importorskip("torch")
    expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(FP8[name], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"layers.0.feed_forward.w1.comfy_quant": mx.array(list(b'{"format": "svdquant_w4a4"}'), mx.uint8)},
            "comfy_quant declares 'svdquant_w4a4', expected float8_e4m3fn or",
        ),
        *(
            ({"layers.0.feed_forward.w1.comfy_quant": mx.array(list(mark), mx.uint8)}, "is not valid")
            for mark in (b"{}", b"[]", b"1", b"\xff", b"[" * 4000, b'{"format": %s}' % (b"9" * 4000))
        ),
        ({"layers.0.feed_forward.w1.comfy_quant": mx.zeros(4097, mx.uint8)}, "expected one axis of at most 4096 bytes"),
        ({"layers.0.feed_forward.w1.comfy_quant": mx.array(1, mx.uint8)}, r"has shape \(\), expected one axis"),
        (
            {"layers.0.feed_forward.w1.scale_weight": mx.ones((3, 4))},
            r"w1 has weight and scale_weight, but no comfy_quant that declares its format",
        ),
        (
            {"layers.0.feed_forward.w1.weight": mx.ones((512, 192), mx.int8)},
            "w1.weight has dtype I8, expected F32",
        ),
        ({"double_blocks.0.img_attn.qkv.weight": mx.ones((3, 4))}, "not part of Z-Image: double_blocks"),
        (
            {"layers.9.feed_forward.w1.weight": mx.ones((512, 192))},
            r"unexpected weights in the transformer \(1\): layers.9.feed_forward.w1",
        ),
        (
            {"layers.0.feed_forward.w1.weight": mx.ones((512, 64))},
            r"wrong shape in the transformer .* has shape \(512, 64\), expected \(512, 192\)",
        ),
        ({"layers.0.attention.qkv.weight": mx.ones((577, 192))}, "cannot be split into 3 equal parts"),
        ({"all_x_embedder.2-1.bias": mx.ones((192,))}, "all_x_embedder.2-1.bias is stored twice"),
    ],
)
def test_unknown_or_misshapen_tensors_are_refused_by_name(split, tmp_path, extra, message):
    tensors = mx.load(str(split / "dit.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        open_source(save(tmp_path / "dit.safetensors", tensors | extra), base="pocket")


def test_a_missing_tensor_is_named(split, tmp_path):
    tensors = mx.load(str(split / "dit.safetensors"))
    tensors.pop("layers.1.attention.qkv.weight")
    message = r"missing weights in the transformer \(3 of \d+\): layers.1.attention.to_q.weight"
    with pytest.raises(CheckpointError, match=message):
        open_source(save(tmp_path / "dit.safetensors", tensors), base="pocket")


# ---- pickles


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin", "safetensors"])
def test_a_pickle_is_recognized_by_its_content_and_never_run(tmp_path, kind, ending):
    import pickle

    file, trap = tmp_path / f"model.{ending}", tmp_path / "sprung"
    if kind == "torch":
        pytest.importorskip("torch").save(Trap(trap), file)
    else:
        file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(CheckpointError, match=r"is a Python pickle, which can run code .* safetensors.torch.save_file"):
        convert(file, tmp_path / "out")
    assert not trap.exists()


@pytest.mark.parametrize("place", ["transformer/diffusion_pytorch_model.bin", "vae/model.safetensors", "model.ckpt"])
def test_a_pickle_in_a_folder_is_refused(tmp_path, place):
    import pickle

    folder = shutil.copytree(POCKET, tmp_path / "folder")
    network, _, name = place.rpartition("/")
    if network:
        (folder / network / "diffusion_pytorch_model.safetensors").unlink()
    else:
        (folder / "model_index.json").unlink()
    (folder / place).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=rf"{name} is a Python pickle, .* safetensors.torch.save_file"):
        open_source(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_next_to_complete_weights_is_ignored(tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert_same(open_source(folder), "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        open_source(folder)


# ---- GGUF


def llama_text_encoder(tensors):
    """Qwen3 with the names of llama.cpp."""
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }  # fmt: skip
    out = {}
    for name, array in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        out[f"blk.{layer[1]}.{parts[layer[2]]}.weight" if layer else whole[name]] = array
    return out


def save_gguf(path, tensors, kind, architecture="lumina2", **options):
    """Write with the gguf package; matrices as kind, the rest as F32, as in ComfyUI-GGUF."""
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(path, architecture, **options)
    writer.add_array("some.list", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    for name, array in tensors.items():
        array = np.array(array.astype(mx.float32))
        matrix = array.ndim == 2 and array.shape[-1] % 32 == 0 and array.shape[0] > 1
        used = package.GGMLQuantizationType[kind if matrix else "F32"]
        writer.add_tensor(name, package.quants.quantize(array, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Half a step in a block of 32, relative to a row's largest value; for _1 kinds the steps span the block's range.
STEPS = {
    "F32": 0,
    "BF16": 0,
    "F16": 2**-11,
    "Q8_0": 0.6 / 127,
    "Q4_0": 1 / 7,
    "Q4_1": 1.2 / 15,
    "Q5_0": 1 / 15,
    "Q5_1": 1.2 / 31,
}


@pytest.mark.parametrize("kind", STEPS)
def test_files_written_by_the_gguf_package_are_read_back(tmp_path, kind):
    dit = save_gguf(tmp_path / "dit.gguf", comfy_transformer(pocket("transformer")), kind)
    qwen = save_gguf(tmp_path / "qwen.gguf", llama_text_encoder(pocket("text_encoder")), kind, "qwen3")
    source = open_source(dit, text_encoder=qwen, base="pocket")
    assert_same(source, "transformer", STEPS[kind])
    assert_same(source, "text_encoder", STEPS[kind])
    assert_same(source, "vae")


def test_a_gguf_file_can_be_converted(tmp_path):
    dit = save_gguf(tmp_path / "dit.gguf", pocket("transformer"), "Q8_0")
    assert open_checkpoint(convert(dit, tmp_path / "out", bits=4, base="pocket"))


def test_comfyuis_models_folder_may_have_gguf_files(tmp_path):
    for folder in ("unet", "clip"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    dit = save_gguf(tmp_path / "models/unet/z-image.gguf", comfy_transformer(pocket("transformer")), "Q8_0")
    qwen = tmp_path / "models/clip/qwen.gguf"
    save_gguf(qwen, llama_text_encoder(pocket("text_encoder")), "Q8_0", "qwen3")
    source = open_source(tmp_path, base="pocket")
    assert {dit, qwen} < set(source.weights)
    assert_same(source, "transformer", STEPS["Q8_0"])
    assert_same(source, "text_encoder", STEPS["Q8_0"])
    with pytest.raises(CheckpointError, match=r"z-image\.gguf is GGUF; convert it first: mlx-zimage convert"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("number", gguf.BLOCK_KINDS)
def test_blocks_are_decoded_as_in_the_gguf_package(number):
    package = pytest.importorskip("gguf")
    kind, theirs = gguf.BLOCK_KINDS[number], package.GGMLQuantizationType(number)
    assert theirs.name == kind.name
    assert package.GGML_QUANT_SIZES[theirs] == (kind.values, kind.block_bytes)
    blocks = np.random.default_rng(number).integers(0, 256, (300, kind.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes include infinite scales
        expected = package.quants.dequantize(blocks, theirs).reshape(300, kind.values)
        assert np.array_equal(kind.decode(blocks), expected, equal_nan=True)


def test_a_range_of_rows_of_a_gguf_tensor_can_be_read(tmp_path):
    file = save_gguf(tmp_path / "dit.gguf", pocket("transformer"), "Q5_1")
    tensor = gguf.read_tensors(file)["layers.0.feed_forward.w2.weight"]
    assert tensor.shape == (192, 512)
    whole = gguf.read_floats(tensor, 0, 192)
    assert np.array_equal(gguf.read_floats(tensor, 17, 40), whole[17:40])


def test_part_of_a_gguf_vector_may_start_and_stop_within_a_block(tmp_path):
    package = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    used = package.GGMLQuantizationType.Q8_0  # blocks of 32 values
    writer = package.GGUFWriter(tmp_path / "dit.gguf", "lumina2")
    writer.add_tensor("x", package.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.read_tensors(tmp_path / "dit.gguf")["x"]
    assert tensor.shape == (128,)
    whole = gguf.read_floats(tensor, 0, 128)
    for start, stop in ((0, 1), (31, 33), (5, 100), (64, 128)):
        assert np.array_equal(gguf.read_floats(tensor, start, stop), whole[start:stop])


def test_damaged_gguf_headers_are_refused(tmp_path):
    file = save_gguf(tmp_path / "dit.gguf", {"x_pad_token": mx.ones((1, 64)), "norm": mx.ones((64,))}, "F32")
    content = file.read_bytes()
    offset = content.index(b"norm") + 20  # after its name, the number of axes, one length and the type
    cases = {
        r"ends at byte \d+, the file at \d+": content[:-1],
        "8 bytes at 16 extend past the end": content[:20],
        "version 9": content[:4] + struct.pack("<I", 9) + content[8:],
        "tensors and 3 metadata values": content[:8] + struct.pack("<Q", 2**60) + content[16:],
        "x_pad_token and norm overlap": content[:offset] + struct.pack("<Q", 224) + content[offset + 8 :],
        "bytes at 32, expected at most 256": content[:24] + struct.pack("<Q", 2**62) + content[32:],
    }
    for fault, damaged in cases.items():
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"is not a complete GGUF file \(.*{fault}"):
            gguf.read_tensors(file)


@pytest.mark.parametrize("kind", ["IQ1_M", "IQ2_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "TQ2_0"])
def test_types_that_the_gguf_package_only_reads_are_read_from_a_file(tmp_path, kind):
    package = pytest.importorskip("gguf")
    used = package.GGMLQuantizationType[kind]
    values, size = package.GGML_QUANT_SIZES[used]
    raw = np.random.default_rng(0).integers(0, 256, (40, 512 // values * size), dtype=np.uint8)
    writer = package.GGUFWriter(tmp_path / "iq.gguf", "lumina2")
    writer.add_tensor("x", raw, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.read_tensors(tmp_path / "iq.gguf")["x"]
    assert tensor.shape == (40, 512)
    with warnings.catch_warnings(action="error"):  # random bytes include infinite scales
        ours = gguf.read_floats(tensor, 3, 40)
    with np.errstate(all="ignore"):
        assert np.array_equal(ours, package.dequantize(raw, used)[3:], equal_nan=True)


def test_an_unknown_gguf_type_is_refused_by_name(tmp_path):
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "dit.gguf", "lumina2")
    used = package.GGMLQuantizationType.MXFP4
    writer.add_tensor("x_pad_token", np.zeros((1, 17), np.uint8), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"dit\.gguf: x_pad_token has type MXFP4, expected one of F32"):
        open_source(tmp_path / "dit.gguf", base="pocket")


def test_the_numbers_of_all_types_are_those_of_the_gguf_package():
    package = pytest.importorskip("gguf")
    ours = {number: kind.name for number, kind in gguf.BLOCK_KINDS.items()} | gguf.OTHER_BLOCK_KINDS
    assert {kind.value: kind.name for kind in package.GGMLQuantizationType}.items() <= ours.items()


def as_stable_diffusion_cpp(tensors):
    """Separate queries, keys and values as stable-diffusion.cpp's converter names them, src/name_conversion.cpp."""
    names = {"to_q.weight": "qkv.weight", "to_k.weight": "qkv.weight.1", "to_v.weight": "qkv.weight.2"}
    out = {}
    for name, array in tensors.items():
        for part, new in names.items():
            name = re.sub(rf"attention\.{re.escape(part)}$", f"attention.{new}", name)
        name = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", name)
        name = name.replace(".to_out.0.", ".out.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
        out[f"model.diffusion_model.{name}"] = array
    return out


def test_queries_keys_and_values_that_stable_diffusion_cpp_numbers_are_distinguished(tmp_path):
    tensors = as_stable_diffusion_cpp(pocket("transformer"))
    assert "model.diffusion_model.layers.0.attention.qkv.weight.2" in tensors
    assert_same(open_source(save(tmp_path / "dit.safetensors", tensors), base="pocket"), "transformer")
    assert_same(open_source(save_gguf(tmp_path / "dit.gguf", tensors, "F16"), base="pocket"), "transformer", 2**-11)


@pytest.mark.parametrize("empty_first", [False, True])
def test_the_parts_of_a_gguf_file_are_read_together(tmp_path, empty_first):
    # the gguf package numbers the parts itself
    save_gguf(tmp_path / "dit.gguf", pocket("transformer"), "F32", split_max_tensors=60, small_first_shard=empty_first)
    parts = sorted(tmp_path.iterdir())
    assert parts[0].name == f"dit-00001-of-{len(parts):05}.gguf" and len(parts) > 2
    for given in (parts[0], parts[-1]):
        source = open_source(given, base="pocket")
        assert_same(source, "transformer")
        assert set(source.weights) >= set(parts[1:])
    parts[1].unlink()
    count = len(parts)
    with pytest.raises(CheckpointError, match=rf"is part 1 of {count}, but dit-00002-of-\d+\.gguf is missing"):
        open_source(parts[0], base="pocket")
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(
        CheckpointError, match=rf"first\.gguf is part 1 of {count}.* this one to NAME-00001-of-0000{count}"
    ):
        open_source(renamed, base="pocket")


def test_a_big_endian_gguf_file_is_reported_as_such(tmp_path):
    package = pytest.importorskip("gguf")
    file = save_gguf(tmp_path / "dit.gguf", {"x": mx.ones((1, 64))}, "F32", endianess=package.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"dit\.gguf is a big-endian GGUF file; download a little-endian one"):
        open_source(file, base="pocket")


# ---- mflux


@pytest.fixture
def mflux_configs(monkeypatch):
    """Pretends that the official model is as small as the folders saved by mflux."""
    monkeypatch.setattr(official, "CONFIGS", mflux_folders.CONFIGS)


@pytest.mark.parametrize("bits", mflux_folders.BITS)
def test_folders_saved_by_mflux_are_read_back(mflux, mflux_configs, few_tokens, bits):
    source = open_source(mflux / f"mflux-{bits or 'dense'}", tokenizer=few_tokens)
    for component in NETWORKS:
        got, expected = read(source, component), mflux_folders.weights(component)
        assert list(got) == list(expected)
        for name, array in expected.items():
            exact = mx.array(array)
            if bits and array.ndim == 2 and not name.endswith("pad_token"):
                # mflux quantizes every matrix, including embeddings and those of the VAE
                packed = mx.quantize(exact.astype(mx.bfloat16), group_size=64, bits=bits)
                packed = [packed[0], *(part.astype(mx.float32) for part in packed[1:])]
                exact = mx.dequantize(*packed, group_size=64, bits=bits)
            assert np.array_equal(got[name], np.array(exact)), name


def test_an_mflux_folder_can_be_converted(mflux, mflux_configs, few_tokens, tmp_path):
    out = convert(mflux / "mflux-8", tmp_path / "out", tokenizer=few_tokens)
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0
    assert open_checkpoint(out)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_mflux_folder_needs_no_index(mflux, mflux_configs, few_tokens, tmp_path, parts):
    folder = shutil.copytree(mflux / "mflux-8", tmp_path / "folder")
    for index in folder.rglob("*.index.json"):
        index.unlink()
    for file in list(folder.rglob("0.safetensors")):
        tensors, metadata = mx.load(str(file), return_metadata=True)
        mx.eval(tensors)
        names = sorted(tensors)
        for i in range(parts):
            own = {name: tensors[name] for name in names[i::parts]}
            mx.save_safetensors(str(file.with_name(f"{i}.safetensors")), own, metadata)
    tiny.litter(folder)
    theirs, ours = (open_source(source, tokenizer=few_tokens) for source in (mflux / "mflux-8", folder))
    for component in NETWORKS:
        expected = read(theirs, component)
        for name, array in read(ours, component).items():
            assert np.array_equal(array, expected[name]), name


# ---- files that are not models


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("LoRA", "diffusion_model.layers.{}.attention.to_q.lora_A.weight"),
        ("LoRA", "lora_unet_layers_{}_attention_to_q.lora_down.weight"),
        ("LoRA", "layers.{}.attention.to_q.lora_A.default.weight"),
        ("LoRA", "lycoris_layers_{}_attention_to_q.lokr_w1"),
        ("LoRA", "diffusion_model.layers.{}.attention_norm1.diff"),
        ("ControlNet", "control_layers.{}.attention.to_q.weight"),
    ],
)
def test_a_lora_or_controlnet_as_source_is_named(tmp_path, kind, name):
    file = save(tmp_path / "file.safetensors", {name.format(i): mx.ones((4, 4)) for i in range(3)})
    with pytest.raises(CheckpointError, match=f"file.safetensors is a {kind}, not a model"):
        open_source(file)


def test_twinflow_is_refused_by_name(tmp_path, split):
    more = {"t_embedder_2.mlp.0.weight": mx.ones((4, 4))}
    file = save(tmp_path / "twinflow.safetensors", mx.load(str(split / "dit.safetensors")) | more)
    for opened in (open_checkpoint, open_source):
        with pytest.raises(CheckpointError, match=r"twinflow.safetensors is TwinFlow, .* a sampler of its own"):
            opened(file)
    shown = CliRunner().invoke(main, ["info", str(file)])
    assert shown.exit_code == 4 and "twinflow.safetensors is TwinFlow" in shown.output
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    save(folder / "transformer" / "diffusion_pytorch_model.safetensors", pocket("transformer") | more)
    for opened in (open_checkpoint, open_source):
        with pytest.raises(CheckpointError, match=r"transformer is TwinFlow"):
            opened(folder)


def older_vae(tensors):
    """The names that older versions of diffusers gave attention."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for name, array in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        out[name] = array
    return out


@pytest.mark.parametrize("prefix", [slow(""), slow("vae."), "first_stage_model."])
@pytest.mark.parametrize("names", [ldm_vae, older_vae], ids=["ldm", "diffusers"])
def test_a_vae_of_your_own_may_have_any_programs_names(tmp_path, names, prefix):
    tensors = {f"{prefix}{name}": array for name, array in names(pocket("vae")).items()}
    file = save(tmp_path / "clear_vae.safetensors", tensors)
    assert_same(open_source("pocket", vae=file), "vae")
    opened = open_checkpoint("pocket", parts={"vae": file}).vae
    assert opened.shapes == open_checkpoint("pocket").vae.shapes and opened.folder == file


# ---- folders as people have them


def test_hidden_files_are_neither_copied_nor_reported_as_damage(tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    tiny.litter(folder)
    out = convert(folder, tmp_path / "out", tokenizer=folder / "tokenizer")
    wanted = convert(POCKET, tmp_path / "wanted")
    assert [path.relative_to(out) for path in sorted(out.rglob("*"))] == [
        path.relative_to(wanted) for path in sorted(wanted.rglob("*"))
    ]
    tiny.litter(out)
    assert verify(out) == [] and verify(folder) == []


def test_a_variant_is_converted_if_it_is_named(tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    whole = folder / "vae" / "diffusion_pytorch_model.safetensors"
    other = {name: array + 1 for name, array in pocket("vae").items()}
    save(whole.with_name("diffusion_pytorch_model.fp16.safetensors"), other)
    assert_same(open_source(folder), "vae")
    source = open_source(folder, variant="fp16")
    assert_same(source, "transformer")
    name = "decoder.conv_in.bias"
    assert np.array_equal(read(source, "vae")[name], np.array(other[name].astype(mx.float32)))
    with pytest.raises(RequestError, match=r"variant must be a file variant of .* \(fp16\); got 'fp8'"):
        open_source(folder, variant="fp8")


@pytest.mark.parametrize("use", ["", slow("Img2Img"), "Inpaint", slow("ControlNet"), slow("ControlNetInpaint")])
def test_the_pipeline_that_is_written_is_that_of_its_networks(tmp_path, use):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    index = json.loads((folder / "model_index.json").read_text())
    own = {"_class_name": f"ZImage{use}Pipeline", "controlnet": ["diffusers", "ZImageControlNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | (own if use else {})))
    out = convert(folder, tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text()) == index


def flux(folder):
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return "model_index.json declares FluxPipeline; expected ZImagePipeline"


def other_scheduler(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "DDIMScheduler"}))
    return "scheduler_config.json"


def no_scheduler(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    return r"scheduler_config\.json is missing"


def larger_tokenizer(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    highest = max(content["model"]["vocab"].values())
    content["model"]["vocab"] |= {f"more {i}": highest + 1 + i for i in range(2000)}
    file.write_text(json.dumps(content))
    return "tokens, but the text encoder has"


def no_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    return "tokenizer.json"


@pytest.mark.parametrize("damage", [flux, other_scheduler, no_scheduler, larger_tokenizer, no_tokenizer])
def test_what_generating_would_refuse_is_not_converted(tmp_path, damage):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    message = damage(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        ZImagePipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert any(re.search(message, fault) for fault in verify(folder)), refused.value


def test_the_schedule_of_a_base_is_not_replaced_by_the_official_one(tmp_path):
    base = shutil.copytree(POCKET, tmp_path / "base")
    no_scheduler(base)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        convert(next((POCKET / "transformer").glob("*.safetensors")), tmp_path / "out", base=base)


def test_a_folder_without_an_index_keeps_its_schedule(tmp_path, few_tokens, mflux, mflux_configs):
    folder = shutil.copytree(mflux / "mflux-8", tmp_path / "folder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(official.SCHEDULER | {"shift": 6.0}))
    out = convert(folder, tmp_path / "out", tokenizer=few_tokens)
    assert open_checkpoint(out).scheduler.shift == 6.0


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_in_a_folder_converts_as_it_does_in_a_file(tmp_path, scaled):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {}
    for name, array in pocket("transformer").items():
        weight = torch.from_numpy(np.array(array.astype(mx.float32)))
        tensors[name] = weight.to(torch.bfloat16)
        if re.search(r"attention\.to_|feed_forward", name):
            scale = weight.abs().max() / 448 if scaled else torch.ones(())
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    save_file(tensors, tmp_path / "dit.safetensors")
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    shutil.copy(tmp_path / "dit.safetensors", folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="; convert it first: mlx-zimage convert SOURCE DEST"):
        open_checkpoint(folder)
    out = convert(folder, tmp_path / "out", bits=8)
    wanted = convert(tmp_path / "dit.safetensors", tmp_path / "wanted", bits=8, base="pocket")
    for path in sorted((wanted / "transformer").iterdir()):
        assert (out / "transformer" / path.name).read_bytes() == path.read_bytes(), path.name
    assert open_checkpoint(out)


# ---- missing parts


def test_missing_parts_are_downloaded_with_a_warning(split, tmp_path, monkeypatch):
    downloads = []

    def resolve(source, names, variant=None):
        if source != "Tongyi-MAI/Z-Image-Turbo":
            return source
        downloads.append((source, names))
        return POCKET

    configs = {name: getattr(open_checkpoint("pocket"), name).raw_config for name in NETWORKS}
    monkeypatch.setattr(official, "CONFIGS", configs)
    monkeypatch.setattr("mlx_zimage.convert.sources.resolve", resolve)
    with pytest.warns(
        BorrowedFromHub, match="dit.safetensors contains no vae or tokenizer; using Tongyi-MAI/Z-Image-Turbo"
    ):
        source = open_source(split / "dit.safetensors", text_encoder=split / "qwen.safetensors")
    assert downloads == [("Tongyi-MAI/Z-Image-Turbo", ["vae"])]
    assert_same(source, "vae")
    assert source.files["tokenizer/tokenizer.json"] == (POCKET / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tokenizer", ["pocket", POCKET / "tokenizer", POCKET / "tokenizer" / "tokenizer.json"])
def test_nothing_is_downloaded_when_everything_is_given(split, monkeypatch, tokenizer):
    configs = {name: getattr(open_checkpoint("pocket"), name).raw_config for name in NETWORKS}
    monkeypatch.setattr(official, "CONFIGS", configs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(
            split / "dit.safetensors", text_encoder="pocket", vae=split / "ae.safetensors", tokenizer=tokenizer
        )
    assert json.loads(source.files["model_index.json"]) == official.MODEL_INDEX
    assert "tokenizer/tokenizer.json" in source.files


def test_a_network_of_a_folder_can_be_replaced(tiny_folder, split):
    tensors = {name: array + 1 for name, array in pocket("vae").items()}
    save(split / "other.safetensors", tensors)
    source = open_source("pocket", vae=split / "other.safetensors", base="pocket")
    assert_same(source, "transformer")
    name = "decoder.conv_in.weight"
    assert np.array_equal(read(source, "vae")[name], np.array(tensors[name].astype(mx.float32)))


def test_parts_that_do_not_form_a_model_are_refused(split, tiny_folder):
    with pytest.raises(RequestError, match="contains no transformer, only vae; give the transformer as the source"):
        open_source(split / "ae.safetensors", base="pocket")
    with pytest.raises(RequestError, match="contains no text_encoder, only vae"):
        open_source("pocket", text_encoder=split / "ae.safetensors", base="pocket")
    with pytest.raises(CheckpointError, match="outputs 40 features per token, but the transformer expects 128"):
        open_source("pocket", text_encoder=tiny_folder)
    with pytest.raises(CheckpointError, match="has no model_index"):
        open_source(split)
    with pytest.raises(CheckpointError, match=r"ae.safetensors is not a tokenizer\.json"):
        open_source("pocket", tokenizer=split / "ae.safetensors")
    with pytest.raises(ModelNotFoundError, match="no model at /no/such"):
        open_source("/no/such/file.safetensors")
