"""Record what diffusers computes in float32 with tiny random weights: the arrays next to this file.

    python tests/golden/make_golden.py

Writes seed0.safetensors, seed7.safetensors, schedules.json and noise.json. Needs torch, diffusers and transformers;
the tests that read the arrays do not. tests/parity calls the same functions with fresh seeds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import controls
import numpy as np
import plain_controlnet
import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from PIL import Image
from safetensors.numpy import save_file

SEEDS = (0, 7)
NOISE_SEEDS = (
    *(0, 1, 2, 3, 7, 42, 123, 1234, 65535, 20251127, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 17),
    *(2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1),
)
NOISE_SHAPES = ((1, 16, 2, 2), (1, 16, 3, 5), (1, 16, 16, 16), (2, 16, 90, 160), (4, 16, 256, 256))

torch.set_grad_enabled(False)
torch.set_num_threads(1)  # networks this small are ten times slower on two threads


def open_pipeline(folder: Path) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def record(seed: int, folder: Path) -> dict[str, np.ndarray]:
    """All arrays of one seed, from diffusers on the checkpoints that tiny.write_kinds wrote to folder."""
    pipe, wide, faint = (open_pipeline(folder / kind) for kind in tiny.KINDS)
    arrays = {
        **{f"text/{name}": x for name, x in record_text(pipe).items()},
        **{f"transformer/{name}": x for name, x in record_transformer(pipe.transformer, seed).items()},
        **{f"vae/{name}": x for name, x in record_vae(pipe.vae, seed).items()},
        **{f"pipeline/{name}": x for name, x in record_runs(pipe, seed).items()},
        **{f"pipeline/{name}": x for name, x in record_image_runs(pipe).items()},
        **{f"pipeline/{name}": x for name, x in record_masked_run(pipe).items()},
        "wide/out": run_case(wide.transformer, seed, "a_pad_both", tiny.WIDE_TRANSFORMER["cap_feat_dim"])[0][:, 0],
        **{f"faint/{name}": x for name, x in record_faint(faint, seed).items()},
        **record_controls(pipe.transformer, seed),
    }
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    for name, x in arrays.items():
        assert np.isfinite(x).all(), name
    return arrays


def record_controls(transformer, seed: int) -> dict[str, np.ndarray]:
    """Outputs with each ControlNet: those of diffusers, and those in the order that it was trained in, computed by
    tests/parity's plain torch."""
    arrays = {}
    for tag, config in controls.CONFIGS.items():
        _, out = run_control(transformer, seed, tag)
        weights = {name: torch.from_numpy(x) for name, x in controls.weights(seed, tag).items()}
        case = {name: torch.from_numpy(x) for name, x in controls.inputs(seed, tag).items()}
        own = {name: x.float() for name, x in transformer.state_dict().items()}
        given = case["x"], case["cap"], case["control"], controls.TIME, controls.SCALE
        trained = plain_controlnet.forward(own, tiny.TRANSFORMER, weights, config, *given)
        arrays |= {f"{tag}/out": out, f"{tag}/trained": trained.numpy()}
    return arrays


def run_control(transformer, seed: int, tag: str) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What diffusers' ControlNet adds to each layer, (1, L, dim) by its number, and the output (16, h, w)."""
    net = ZImageControlNetModel(**controls.CONFIGS[tag])
    net.load_state_dict({name: torch.from_numpy(x) for name, x in controls.weights(seed, tag).items()})
    net = ZImageControlNetModel.from_transformer(net.eval(), transformer)
    case = {name: torch.from_numpy(x) for name, x in controls.inputs(seed, tag).items()}
    x, control, time = [case["x"][:, None]], [case["control"][:, None]], torch.tensor([controls.TIME])
    with torch.no_grad():
        hints = net(x, time, [case["cap"]], control, conditioning_scale=controls.SCALE)
        out = transformer(x, time, [case["cap"]], controlnet_block_samples=hints, return_dict=False)[0][0][:, 0]
    return {place: hint.numpy() for place, hint in hints.items()}, out.numpy()


def record_text(pipe) -> dict[str, np.ndarray]:
    """Ids and embeddings of PROMPTS; for the short one, also each layer's output (the last one normed)."""
    arrays = {}
    for key, prompt in tiny.PROMPTS.items():
        turn = [{"role": "user", "content": prompt}]
        text = pipe.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids = pipe.tokenizer([text], max_length=512, truncation=True, return_tensors="pt").input_ids
        arrays[f"{key}.ids"] = ids[0].numpy().astype(np.int32)
        arrays[f"{key}.embeds"] = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")[0][0]
        if key == "short":
            for i, hidden in enumerate(pipe.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states):
                arrays[f"short.hidden_{i}"] = hidden[0]
    return arrays


def run_case(model, seed: int, case: str, features: int = 40, scale: float = 1) -> list[torch.Tensor]:
    """The raw outputs (16, 1, h, w) for one batch, with captions times scale; the pipeline negates them."""
    latents, captions, times = zip(*tiny.case_inputs(seed, case, features), strict=True)
    latents = [torch.from_numpy(x)[:, None] for x in latents]
    captions = [torch.from_numpy(x) * scale for x in captions]
    return model(latents, torch.tensor(times), captions, return_dict=False)[0]


def record_transformer(model, seed: int) -> dict[str, np.ndarray]:
    arrays = {}
    for case in tiny.CASES:
        for i, out in enumerate(run_case(model, seed, case)):
            arrays[f"{case}.out{i}"] = out[:, 0]
    parts = {
        "t_embedder": model.t_embedder,
        "x_embedder": model.all_x_embedder["2-1"],
        "cap_embedder": model.cap_embedder,
        "layers.0.attention": model.layers[0].attention,
        "layers.0.feed_forward": model.layers[0].feed_forward,
        "layers.0.adaLN_modulation": model.layers[0].adaLN_modulation,
        "final_layer": model.all_final_layer["2-1"],
        **{f"{row}.{i}": m for row in ("noise_refiner", "context_refiner", "layers")
           for i, m in enumerate(getattr(model, row))},
    }  # fmt: skip
    seen = watch(parts, lambda: run_case(model, seed, "a_pad_both"))
    arrays |= {f"a_pad_both.mid.{name}": x for name, x in seen.items()}
    latents, caption, _ = tiny.case_inputs(seed, "a_pad_both")[0]
    fed = model.patchify_and_embed([torch.from_numpy(latents)[:, None]], [torch.from_numpy(caption)], 2, 1)
    # these are padded to a multiple of 32 rows by repeating the last patch, which x_pad_token replaces later
    arrays["a_pad_both.mid.patches"] = fed[0][0]
    arrays["a_pad_both.mid.x_pos_ids"] = fed[3][0].int()
    arrays["a_pad_both.mid.cap_pos_ids"] = fed[4][0].int()
    table = model.rope_embedder(fed[3][0])
    arrays["a_pad_both.mid.x_rope_cos"], arrays["a_pad_both.mid.x_rope_sin"] = table.real, table.imag
    return arrays


def record_faint(pipe, seed: int) -> dict[str, np.ndarray]:
    vae = pipe.vae
    posterior = vae.encode(torch.from_numpy(tiny.encoder_image(seed))).latent_dist
    z = torch.from_numpy(tiny.randn(seed, "vae.z.one", 1, 16, 2, 4))
    return {
        "embeds": pipe.encode_prompt(tiny.PROMPTS["short"], do_classifier_free_guidance=False, device="cpu")[0][0],
        "out": run_case(pipe.transformer, seed, "a_pad_both", scale=1e-3)[0][:, 0],
        "image": vae.decode(z, return_dict=False)[0],
        "mean": posterior.mean,
        "logvar": posterior.logvar,
    }


def record_vae(vae, seed: int) -> dict[str, np.ndarray]:
    """Pixels decoded from unscaled latents, and moments of an image; all (B, C, h, w)."""
    decoder = vae.decoder
    parts = {
        "conv_in": decoder.conv_in,
        "mid_attn": decoder.mid_block.attentions[0],
        "mid_block": decoder.mid_block,
        "up_blocks.0": decoder.up_blocks[0],
    }
    arrays = {}
    for tag, (h, w) in {"wide": (10, 12), "one": (2, 4)}.items():
        z = torch.from_numpy(tiny.randn(seed, f"vae.z.{tag}", 1, 16, h, w))
        arrays[f"{tag}.image"] = vae.decode(z, return_dict=False)[0]
        if tag == "wide":
            arrays |= {f"wide.dec.{name}": x for name, x in watch(parts, lambda z=z: vae.decode(z)).items()}
    posterior = vae.encode(torch.from_numpy(tiny.encoder_image(seed))).latent_dist
    arrays["enc.mean"], arrays["enc.logvar"] = posterior.mean, posterior.logvar
    arrays["enc.latents"] = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    return arrays


def record_runs(pipe, seed: int) -> dict[str, np.ndarray]:
    """Latents after every step (steps, 1, 16, h, w) of each of RUNS, and the images of two of them."""
    size = {"height": tiny.HEIGHT, "width": tiny.WIDTH}
    z0 = torch.from_numpy(tiny.randn(seed, "pipe.z0", 1, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8))
    arrays = {}
    for name, run in tiny.RUNS.items():
        seen = []

        def keep(_pipe, _i, _t, state, seen=seen):
            seen.append(state["latents"].clone())
            return {}

        pipe(**size, **run, latents=z0.clone(), output_type="latent", callback_on_step_end=keep)
        arrays[f"{name}.steps"] = torch.stack(seen)
        if name in ("t2i8", "cfg4"):
            arrays[f"{name}.image"] = pipe(**size, **run, latents=z0.clone(), output_type="np").images
            arrays[f"{name}.image_u8"] = np.array(pipe(**size, **run, latents=z0.clone()).images[0])
    z0 = torch.from_numpy(tiny.randn(seed, "pipe.zz", 2, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8))
    prompts = [tiny.PROMPTS["short"], tiny.PROMPTS["medium"]]
    two = pipe(prompts, **size, num_inference_steps=2, guidance_scale=0.0, latents=z0, output_type="latent")
    arrays["batch2.latents"] = two.images
    return arrays


def record_image_runs(pipe) -> dict[str, np.ndarray]:
    """Latents after every step (steps, 1, 16, h, w) of each of IMAGE_RUNS, whose image latents are sampled."""
    pipe = ZImageImg2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    arrays = {}
    for name, (strength, steps) in tiny.IMAGE_RUNS.items():
        seen = []

        def keep(_pipe, _i, _t, state, seen=seen):
            seen.append(state["latents"].clone())
            return {}

        pipe(
            tiny.PROMPTS["short"], Image.fromarray(tiny.photo()), strength, num_inference_steps=steps,
            guidance_scale=0.0, generator=torch.Generator().manual_seed(tiny.IMAGE_SEED), output_type="latent",
            callback_on_step_end=keep,
        )  # fmt: skip
        arrays[f"{name}.steps"] = torch.stack(seen)
    return arrays


def record_masked_run(pipe) -> dict[str, np.ndarray]:
    """Latents after every step (4, 1, 16, h, w) of an inpainting, whose image latents are sampled."""
    pipe = ZImageInpaintPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def keep(_pipe, _i, _t, state):
        seen.append(state["latents"].clone())
        return {}

    pipe(
        tiny.PROMPTS["short"], Image.fromarray(tiny.photo()), Image.fromarray(tiny.mask()), num_inference_steps=4,
        guidance_scale=0.0, generator=torch.Generator().manual_seed(tiny.IMAGE_SEED), output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    return {"inpaint.steps": torch.stack(seen)}


def watch(modules: dict, run) -> dict[str, torch.Tensor]:
    """Each module's output during run()."""
    seen = {}

    def hook(name):
        def keep(_module, _inputs, out):
            seen[name] = (out[0] if isinstance(out, (tuple, list)) else out).clone()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


def record_schedules() -> list[dict]:
    rows = []
    for shift in (3.0, 6.0):
        for steps in (1, 2, 4, 8, 9, 20, 28, 50):
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
            scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), mu=1.0)
            times = [float((1000 - t) / 1000) for t in scheduler.timesteps]
            rows.append({"kind": "static", "shift": shift, "steps": steps, "sigmas": scheduler.sigmas, "times": times})
    for steps in (4, 8, 9):  # as in diffusers 0.36: the last step is at sigma 0
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        scheduler.sigma_min = 0.0
        scheduler.set_timesteps(steps)
        rows.append({"kind": "diffusers 0.36", "shift": 3.0, "steps": steps, "sigmas": scheduler.sigmas})
    for pixels in (512, 1024, 2048):
        tokens = (pixels // 16) ** 2
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=True, shift=1.0)
        mu = calculate_shift(tokens)
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(8), mu=mu)
        rows.append({"kind": "dynamic", "tokens": tokens, "mu": mu, "steps": 8, "sigmas": scheduler.sigmas})
    return [row | {"sigmas": row["sigmas"].tolist()} for row in rows]


def record_noise() -> list[dict]:
    """First and last values and float64 sum of torch.randn, and the CRC-32 of torch.rand, for each seed and shape."""
    rows = []
    for seed in NOISE_SEEDS:
        for shape in NOISE_SHAPES:
            normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
            uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
            ends = torch.cat([normal[:16], normal[-16:]])
            rows.append({
                "seed": seed,
                "shape": shape,
                "ends": [round(float(x), 8) for x in ends],
                "sum": round(float(normal.double().sum()), 6),
                "uniform_crc32": zlib.crc32(uniform.numpy().tobytes()),
            })  # fmt: skip
    return rows


def write_rows(name: str, rows: list[dict]) -> None:
    (tiny.GOLDEN / name).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main() -> None:
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            arrays = record(seed, tiny.write_kinds(Path(folder), seed))
        save_file(arrays, tiny.GOLDEN / f"seed{seed}.safetensors")
    write_rows("schedules.json", record_schedules())
    write_rows("noise.json", record_noise())


if __name__ == "__main__":
    main()
