"""Measure a plain training loop to compare ours with: python tests/peer_training.py [--side 512 1024] [--steps 10]

diffusers' transformer of full size with random weights in bfloat16, peft's factors of rank 16 in float32 on the same
210 matrices, gradient checkpointing, and AdamW, on a CUDA GPU with torch, diffusers and peft. Prints the median seconds
per step of one image with a caption of 96 tokens, and the peak memory; `full_size_training.py` prints ours.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig

TOKENS, RANK = 96, 16
WARM_UP = 3  # steps
LAYERS = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"


def random_transformer() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.no_grad():
        transformer = ZImageTransformer2DModel()
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    torch.set_default_dtype(torch.float32)
    return transformer.requires_grad_(False)


def measure(transformer: ZImageTransformer2DModel, factors: list, side: int, steps: int) -> str:
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    shape = 16, 1, side // 8, side // 8
    latents = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    caption = torch.randn(TOKENS, transformer.config.cap_feat_dim, device="cuda", dtype=torch.bfloat16)
    sigma, times = 0.5, []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        noise = torch.randn_like(latents)
        noisy, at = (1 - sigma) * latents + sigma * noise, torch.tensor([1 - sigma], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            found = transformer([noisy], at, [caption], return_dict=False)[0][0]
        (found.float() - (latents - noise).float()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return f"{statistics.median(times[WARM_UP:]):.2f} | {torch.cuda.max_memory_allocated() / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    transformer = random_transformer()
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    factors = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    print("| images | s per step | peak GB |\n|---|---|---|")
    for side in options.side:
        print(f"| {side}x{side} | {measure(transformer, factors, side, options.steps)} |", flush=True)


if __name__ == "__main__":
    main()
