"""Links out of a model's folder are refused by every command, since they may point to anything."""

import shutil

import mlx.core as mx
import pytest
import tiny
from click.testing import CliRunner

from mlx_zimage import CheckpointError, cli
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights.lora import read_lora

GENERATE = ["generate", "a fox", "--steps", "1", "--size", "32x32", "-q", "-m"]
COMMANDS = {"info": ["info"], "plan": ["plan"], "verify": ["verify", "-q"], "generate": GENERATE}


def run(*args: object):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"),
        *("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_out_of_a_models_folder_is_not_followed(folder, tmp_path, monkeypatch, command, name, kind):
    monkeypatch.chdir(tmp_path)
    outside, file = tmp_path / "outside", folder / name
    outside.mkdir()
    link = file.parent if kind == "folder" and file.parent != folder else file
    shutil.move(link, outside / "there")
    link.symlink_to(outside / "there")
    result = run(*COMMANDS[command], folder)
    assert result.exit_code == 4 and "is a link to " in result.output, result.output
    assert not (tmp_path / "image.png").exists()


def test_a_model_that_is_a_link_itself_and_links_within_it_are_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    file = next((folder / "vae").glob("*.safetensors"))
    file.rename(folder / "there")
    file.symlink_to(folder / "there")
    assert run("info", tmp_path / "link").exit_code == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_a_loras_folder_is_not_followed(tmp_path, name):
    own, d = tmp_path / "lora", tiny.TRANSFORMER["dim"]
    own.mkdir()
    factors = {"lora_A": mx.ones((2, d)), "lora_B": mx.ones((d, 2))}
    layer = "base_model.model.layers.0.attention.to_q"
    mx.save_safetensors(
        str(own / "adapter_model.safetensors"), {f"{layer}.{name}.weight": x for name, x in factors.items()}
    )
    (own / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    configs = {"transformer": TransformerConfig.from_dict(tiny.TRANSFORMER)}
    read_lora(own, configs)
    (own / name).rename(tmp_path / name)
    (own / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link to "):
        read_lora(own, configs)
