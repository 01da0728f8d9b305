"""Train the pocket checkpoint from scratch: python examples/pocket/train.py --out DIR

Stages: tokenizer, autoencoder (which must reconstruct well enough to go on), latents, flow
matching, distillation, export. The long ones end by the clock. Each finished stage is saved in DIR, as is the state of
flow matching from time to time; the same command continues where it was interrupted. The checkpoint is in
DIR/checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from export import export, folder_size
from flow_stage import FactsHead, Model, generate_pairs, train_flow
from judge import as_markdown, judge, scores
from model import (
    LATENT_CHANNELS,
    PAD_TO,
    SCALING,
    SHIFT,
    STEPS,
    Blocks,
    build_text_encoder,
    build_transformer,
    build_vae,
    sample,
)
from optim import Clock
from pool import LONGEST, make_buckets, order_scenes
from scenes import held_out_scenes, sample_scene
from tokenizer import encode, train_tokenizer
from tokenizers import Tokenizer
from vae_stage import as_images, reconstructions, train_vae

VALIDATION_SEED = 4242  # the final evaluation uses others


@dataclass(frozen=True)
class Plan:
    """How much each stage does. The long ones end when their seconds run out: no machine at hand can do their steps in
    that time.

    The defaults take about 16 minutes on any machine; the quality of the result depends on it.
    """

    vae_images: int = 60000
    vae_seconds: float = 250.0  # compiling included
    vae_steps: int = 40000
    vae_batch: int = 96
    vae_rate: float = 1e-3
    gate: float = 97.0  # least share of reconstructions that the judge passes, in percent
    scenes: int = 400000
    batch: int = 512
    flow_seconds: float = 480.0  # compiling included
    flow_steps: int = 200000
    flow_rate: float = 1e-3
    pairs: int = 200000
    distill_seconds: float = 170.0  # generating the pairs included
    distill_steps: int = 80000
    distill_rate: float = 4e-4
    judged: int = 500

    def scaled(self, scale: float) -> Plan:
        """Every amount except the seconds times `scale`, and no gate: to try the code out."""
        if scale == 1:
            return self
        amounts = {
            name: max(8, int(scale * getattr(self, name)))
            for name in (
                "vae_images",
                "vae_steps",
                "vae_batch",
                "scenes",
                "batch",
                "flow_steps",
                "pairs",
                "distill_steps",
                "judged",
            )
        }
        return replace(self, gate=0.0, **amounts)


class Trainer:
    def __init__(self, folder: Path, plan: Plan, device: str, is_compiled: bool, workers):
        self.folder, self.plan, self.device, self.is_compiled = folder, plan, device, is_compiled
        self.workers, self.started = workers, time.time()

    def log(self, text: str) -> None:
        print(f"[{time.time() - self.started:6.1f} s] {text}", flush=True)

    def run(self, last_stage: str) -> None:
        tokenizer = self.tokenizer()
        self.check_captions(tokenizer)
        orders = None
        if last_stage != "vae" and not self._file("distilled").exists():
            orders = order_scenes(self.workers, self.plan.scenes, str(self._tokenizer_file), seed=1)
        vae = self.vae()
        if last_stage == "vae":
            return
        model = self.model(tokenizer)
        if not self._file("distilled").exists():
            buckets = make_buckets(orders, vae, self.device, self.log)
            self.flow(model, buckets, vae, tokenizer)
            if last_stage == "flow":
                return
            self.distill(model, buckets)
        self._load("distilled", model)
        self.measure("distilled", model, vae, tokenizer)
        checkpoint = self.folder / "checkpoint"
        export(vae, model.encoder, model.transformer, checkpoint)
        self.log(f"{checkpoint}: {folder_size(checkpoint) / 1e6:.2f} MB")

    # -------------------------------------------------------------- stages
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer_file.exists():
            return Tokenizer.from_file(str(self._tokenizer_file))
        tokenizer = train_tokenizer(self._tokenizer_file.parent)
        self.log("tokenizer trained")
        return tokenizer

    def check_captions(self, tokenizer: Tokenizer) -> None:
        """Check that all captions used for scoring fit, and nearly all used for training."""
        rng = random.Random(3)
        trained = [sample_scene(rng).caption for _ in range(2000)]
        measured = [scene.caption for scene in held_out_scenes(self.plan.judged, VALIDATION_SEED)]
        lengths, needed = (encode(tokenizer, captions, 4 * LONGEST)[1] for captions in (trained, measured))
        if needed.max() > LONGEST or (lengths > LONGEST).mean() > 0.01:
            sys.exit(
                f"captions are up to {max(needed.max(), lengths.max())} tokens long; expected at most {LONGEST}: "
                "raise LONGEST in pool.py, or shorten captions.py"
            )
        self.log(f"captions: {lengths.mean():.1f} tokens on average, {(lengths <= PAD_TO).mean():.0%} within {PAD_TO}")

    def vae(self):
        plan = self.plan
        if self._file("vae").exists():
            vae = build_vae().to(self.device)
            vae.load_state_dict(torch.load(self._file("vae"), map_location=self.device))
            return vae.eval().requires_grad_(False)
        torch.backends.cudnn.benchmark = True  # one shape of batch, so it pays; later there are many
        vae = train_vae(
            plan.vae_steps,
            plan.vae_seconds,
            plan.vae_images,
            plan.vae_batch,
            plan.vae_rate,
            self.device,
            self.log,
            self.is_compiled,
        )
        torch.backends.cudnn.benchmark = False
        scenes, images, (mean, deviation) = reconstructions(vae, plan.judged, VALIDATION_SEED, self.device)
        right = self._judge("reconstructions", scenes, images)
        self.log(f"scaled latents: mean {mean:.3f}, deviation {deviation:.3f}")
        if right < plan.gate:
            torch.save(vae.state_dict(), self._file("vae_rejected"))
            sys.exit(
                f"the autoencoder reconstructs {right:.1f} % of the scenes well enough for the judge; "
                f"expected {plan.gate:.0f} %: train it for more than {plan.vae_seconds:.0f} s (--vae-seconds)"
            )
        self._save("vae", vae.state_dict())
        return vae

    def model(self, tokenizer: Tokenizer) -> Model:
        tokens, lengths = (torch.from_numpy(array).long().to(self.device) for array in encode(tokenizer, [""], PAD_TO))
        torch.manual_seed(0)
        encoder, transformer, head = build_text_encoder(), build_transformer(), FactsHead()
        return Model(
            encoder.to(self.device),
            transformer.to(self.device),
            head.to(self.device),
            tokens,
            lengths,
            Blocks(self.is_compiled),
        )

    def flow(self, model: Model, buckets, vae, tokenizer) -> None:
        plan = self.plan
        if not self._file("flow").exists():
            done = self._load("flow_part", model) if self._file("flow_part").exists() else 0.0
            train_flow(
                model,
                buckets,
                Clock(plan.flow_steps, plan.flow_seconds, self.device, done),
                plan.batch,
                plan.flow_rate,
                self.device,
                self.log,
                keep=lambda progress: self._save("flow_part", self._state(model, progress)),
            )
            self._save("flow", self._state(model))
            self._file("flow_part").unlink(missing_ok=True)
            self.measure("flow", model, vae, tokenizer)
        self._load("flow", model)

    def distill(self, model: Model, buckets) -> None:
        plan = self.plan
        started = time.monotonic()
        pairs = generate_pairs(model, buckets, plan.pairs, plan.batch, self.device, self.log)
        train_flow(
            model,
            pairs,
            Clock(plan.distill_steps, plan.distill_seconds - (time.monotonic() - started), self.device),
            plan.batch,
            plan.distill_rate,
            self.device,
            self.log,
            name="distillation",
            schedule_share=0.6,
        )
        self._save("distilled", self._state(model))

    # -------------------------------------------------------------- measuring
    @torch.no_grad()
    def measure(self, name: str, model: Model, vae, tokenizer: Tokenizer) -> float:
        """Judge images of the validation prompts, generated in eight steps."""
        scenes = held_out_scenes(self.plan.judged, VALIDATION_SEED)
        tokens, lengths = (
            torch.from_numpy(array).long().to(self.device)
            for array in encode(tokenizer, [scene.caption for scene in scenes], LONGEST)
        )
        keys = [
            (scene.width, scene.height, PAD_TO if length <= PAD_TO else LONGEST)
            for scene, length in zip(scenes, lengths.tolist(), strict=True)
        ]
        images: list[np.ndarray | None] = [None] * len(scenes)
        generator = torch.Generator().manual_seed(11)
        for key in sorted(set(keys)):
            width, height, padded = key
            chosen = [i for i, one in enumerate(keys) if one == key]
            noise = torch.randn(len(chosen), LATENT_CHANNELS, height // 8, width // 8, generator=generator)
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
                latents = sample(
                    model.encoder,
                    model.transformer,
                    noise.to(self.device),
                    tokens[chosen, :padded],
                    lengths[chosen],
                    STEPS,
                )
                generated = vae.decoder(latents / SCALING + SHIFT)
            for i, image in zip(chosen, as_images(generated), strict=True):
                images[i] = image
        return self._judge(name, scenes, images)

    def _judge(self, name: str, scenes, images) -> float:
        verdicts = self.workers.starmap(judge, zip(images, scenes, strict=True), chunksize=8)
        table = scores(scenes, verdicts)
        self.log(f"{name}, judged:\n{as_markdown(table)}")
        return table[0].right

    # -------------------------------------------------------------- files
    @property
    def _tokenizer_file(self) -> Path:
        return self.folder / "checkpoint" / "tokenizer" / "tokenizer.json"

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage}.pt"

    def _save(self, stage: str, state: dict) -> None:
        part = self._file(stage).with_suffix(".part")  # never leave half a file under the real name
        torch.save(state, part)
        part.replace(self._file(stage))

    def _state(self, model: Model, progress: float = 1.0) -> dict:
        modules = {"encoder": model.encoder, "transformer": model.transformer, "facts_head": model.facts_head}
        return {"progress": progress, **{name: module.state_dict() for name, module in modules.items()}}

    def _load(self, stage: str, model: Model) -> float:
        state = torch.load(self._file(stage), map_location=self.device)
        for name in ("encoder", "transformer", "facts_head"):
            getattr(model, name).load_state_dict(state[name])
        return state["progress"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor for every amount except the seconds; small to try the code out"
    )
    parser.add_argument("--until", default="export", choices=("vae", "flow", "export"), help="the last stage to run")
    parser.add_argument("--vae-seconds", type=float, default=Plan.vae_seconds)
    parser.add_argument("--flow-seconds", type=float, default=Plan.flow_seconds)
    parser.add_argument("--distill-seconds", type=float, default=Plan.distill_seconds)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="compile the models; by default on a GPU"
    )
    options = parser.parse_args()
    plan = replace(
        Plan(),
        vae_seconds=options.vae_seconds,
        flow_seconds=options.flow_seconds,
        distill_seconds=options.distill_seconds,
    ).scaled(options.scale)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked workers don't mix
    options.out.mkdir(parents=True, exist_ok=True)
    is_compiled = options.device == "cuda" if options.compile is None else options.compile
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs uncompiled
    # the workers, which sample scenes and judge, are forked before the GPU is touched
    with multiprocessing.get_context("fork").Pool(options.workers) as workers:
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        Trainer(options.out, plan, options.device, is_compiled, workers).run(options.until)


if __name__ == "__main__":
    main()
