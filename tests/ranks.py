"""Generate images on several ranks, and start the processes for that: MLX's ring on this machine.

    python ranks.py MODEL CALLS.json OUT.npz OPTIONS

CALLS.json is a list of a pipeline call's arguments; the image "photo" is the tests' own. Rank 0 writes the result of
each call. In MODEL, {rank} is the rank. OPTIONS is a JSON object: speeds as in Group; memory, budgets by rank;
limits, the values of distributed's constants; and lora, a file that the model gets instead of a ControlNet. However
small an image is, all ranks share it, unless OPTIONS has another `least` number of tokens.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import controls
import numpy as np
import tiny

from mlx_zimage import ZImagePipeline, distributed
from mlx_zimage.distributed import Group


def free_port(count: int = 1) -> int:
    """The first of `count` consecutive free ports."""
    while True:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            sockets[0].bind(("127.0.0.1", 0))
            first = sockets[0].getsockname()[1]
            with suppress(OSError, OverflowError):
                for i, one in enumerate(sockets[1:], 1):
                    one.bind(("127.0.0.1", first + i))
                return first


def group(size: int, folder: Path) -> dict[str, str]:
    """The environment of a group's ranks, but for MLX_RANK."""
    hosts = [[f"127.0.0.1:{free_port()}"] for _ in range(size)]
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    return {"MLX_HOSTFILE": str(hostfile)}


def start(size: int, folder: Path, words: list[str], **environment: str) -> list[subprocess.Popen]:
    """Start a command as each rank of a group, as mlx.launch does with the ring backend. {rank} in it is the rank."""
    own = {**os.environ, **group(size, folder), **environment}
    return [
        subprocess.Popen(
            [word.replace("{rank}", str(rank)) for word in words],
            env={**own, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parent,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """The exit code and the output of each rank."""
    output = [process.communicate(timeout=seconds)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, output, strict=True)]


def results(pipe: ZImagePipeline, calls: list[dict]) -> list[np.ndarray]:
    """The final latents of each call, (B, C, h, w), unless it has another output_type."""
    photo = tiny.photo()
    given = [{name: photo if value == "photo" else value for name, value in call.items()} for call in calls]
    return [pipe(**{"output_type": "latent"} | call).images for call in given]


def open_pipeline(
    model: str, folder: Path | None, group: Group | None = None, memory: str | None = None
) -> ZImagePipeline:
    """A float32 pipeline, with a ControlNet that is written to the folder if there is one."""
    pipe = ZImagePipeline.from_pretrained(model, dtype="float32", memory=memory, group=group)
    if folder is not None:
        pipe.load_controlnet(controls.write(folder, 0, "control_v21"))
    return pipe


def main(model: str, calls: str, out: str, options: str) -> None:
    given = json.loads(options)
    distributed.LEAST = given.get("least", 1)
    for name, seconds in given.get("limits", {}).items():
        setattr(distributed, name, seconds)
    launched = Group.launched()
    assert launched is not None
    group = Group(launched.group, given["speeds"]) if given.get("speeds") else launched
    memory = given.get("memory", {}).get(str(group.rank))
    source, folder = model.format(rank=group.rank), Path(out).parent / f"rank{group.rank}"
    pipe = open_pipeline(source, None if "lora" in given else folder, group, memory)
    if "lora" in given:
        pipe.load_lora(given["lora"])
    Path(f"{out}.{group.rank}").touch()  # the model is open
    if group.leads:
        with closing(pipe):
            np.savez(out, *results(pipe, json.loads(Path(calls).read_text())))
    else:
        pipe.follow()


if __name__ == "__main__":
    main(*sys.argv[1:])
