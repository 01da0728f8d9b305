"""ControlNets in diffusers: what each block adds, and its pipeline, for version 1, which diffusers runs in the order it
was trained in."""

import controls
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error
from PIL import Image

from mlx_zimage import ZImagePipeline


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_run_with_a_control_image_equals_diffusers(golden, reference, tmp_path, guidance):
    torch = reference.torch
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline

    base = reference.open_pipeline(golden.folder)
    net = ZImageControlNetModel(**controls.CONFIGS["control_v1"])
    weights = controls.weights(golden.seed, "control_v1")
    net.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    theirs = ZImageControlNetPipeline(**base.components, controlnet=net.eval())
    theirs.set_progress_bar_config(disable=True)
    image = Image.fromarray(tiny.photo())
    given = {"control_image": image, "controlnet_conditioning_scale": 0.6, "guidance_scale": guidance}
    given |= {"height": tiny.HEIGHT, "width": tiny.WIDTH, "num_inference_steps": 3, "output_type": "latent"}
    wanted = theirs("a red fox", **given, generator=torch.Generator().manual_seed(3)).images
    ours = ZImagePipeline.from_pretrained(golden.folder, dtype="float32")
    ours.load_controlnet(controls.write(tmp_path, golden.seed, "control_v1"))
    assert relative_error(ours("a red fox", **given, seed=3).images, np.asarray(wanted)) < TOLERANCE


@pytest.mark.parametrize("tag", list(controls.CONFIGS))
def test_what_each_block_adds_equals_diffusers(golden, reference, tmp_path, tag):
    wanted, _ = reference.run_control(reference.open_pipeline(golden.folder).transformer, golden.seed, tag)
    opened, case = controls.opened(tmp_path, golden.seed, tag), controls.inputs(golden.seed, tag)
    network = controls.network(golden.pipe, opened, kind=controls.AsDiffusers)
    controls.run(network, case, controls.controlled(opened, case["control"]))
    assert network.hints.keys() == wanted.keys()
    for place, hint in network.hints.items():
        assert relative_error(np.array(hint), wanted[place]) < TOLERANCE
