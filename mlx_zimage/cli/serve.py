from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import click

from ..errors import RequestError, ZImageError
from ..launched import launched_rank
from ..sizes import parse_memory
from ..untrusted import read_bytes
from ..variants import ALIASES, MOST_TURBO_STEPS, TURBO, repository_of
from .controls import control_kind_option
from .elsewhere import Command
from .models import DEFAULT_MODEL, first_run
from .output import say
from .values import API_KEY, FilePath, LoraName, ModelName, memory_option, yes_option

PORT = 8796
MAX_KEY = 1000  # bytes
UNITS = {"s": 1, "m": 60, "h": 3600}


class Duration(click.ParamType):
    """A time such as 30s, 10m or 2h, in seconds; "never" is None."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        match = re.fullmatch(r"(\d{1,6})([smh])", str(value))
        if not match and value != "never":
            self.fail(f"expected a time such as 30s, 10m or 2h, or never, but got {value!r}", param, ctx)
        return float(match[1]) * UNITS[match[2]] if match else None


@click.command(
    cls=Command,
    epilog="Example: mlx-zimage serve; then, in a client: base URL http://127.0.0.1:8796/v1, and any API key",
)
@click.option(
    "-m",
    "--model",
    "sources",
    multiple=True,
    type=ModelName(),
    help="Serve this model: a folder or file, a Hugging Face id, 'z-image-turbo', 'z-image' or 'pocket'. Repeatable; "
    f"requests name one of them, or get the first.  [default: {DEFAULT_MODEL}, converted]",
)
@click.option(
    "--lora-dir",
    type=FilePath(exists=True, file_okay=False),
    help="Let requests use the LoRAs in this folder, by file name.",
)
@click.option(
    "--control-model",
    metavar="PATH",
    type=LoraName(),
    help="ControlNet Union for requests with control images: a file, a folder, a Hugging Face id or id:file.  "
    "[default: none; pocket has its own]",
)
@control_kind_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. One that other "
              "machines can reach needs an API key or --no-api-key.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="Port; 0 for any.")
@click.option(
    "--api-key-file",
    type=FilePath(exists=True, dir_okay=False),
    help=f"Require the API key in this file; or set {API_KEY} to the key itself.",
)
@click.option("--no-api-key", is_flag=True, help="Let anyone who can reach --host generate images.")
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages from ORIGIN, such as https://app.example, use the server. Repeatable.",
)
@memory_option
@click.option(
    "--queue",
    "limit",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Number of requests that may wait; more are answered with 429.",
)
@click.option(
    "--idle-unload",
    "idle_s",
    type=Duration(),
    default="10m",
    show_default=True,
    help="Unload the model after this long without a request; 'never' keeps it. The next request loads it again.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=Duration(),
    default="1h",
    show_default=True,
    help="Stop a request that is not finished within this time, waiting included; 'never' sets no limit.",
)
@click.option(
    "--honor-client-steps",
    is_flag=True,
    help="Run Turbo with the steps and guidance that clients send. By default, more than "
    f"{MOST_TURBO_STEPS} steps become {TURBO.steps} and guidance is off: many clients send values for other models, "
    "which would take 5 to 12 times as long and look worse.",
)
@click.option("--open", "show", is_flag=True, help="Open the server's page in your browser.")
@yes_option
def serve(
    sources: tuple[str, ...], lora_dir: Path | None, control_model: str | None, control_kind: str | None,
    host: str, port: int, api_key_file: Path | None, no_api_key: bool, origins: tuple[str, ...],
    memory: str | None, limit: int, idle_s: float | None, deadline_s: float | None, honor_client_steps: bool,
    show: bool, yes: bool,
) -> None:  # fmt: skip
    """Serve images over HTTP, to your browser and to clients of OpenAI's and AUTOMATIC1111's APIs.

    Prints its address; open it in a browser for the server's page. The model stays loaded between
    requests, and images are generated one at a time. See examples/server.md for the settings of Open WebUI,
    SillyTavern, LibreChat and the OpenAI SDK. Ctrl-C stops the server.
    """
    try:
        from ..server.app import listen, serve
        from ..server.guard import Access
        from ..server.messages import Options
        from ..server.queue import Queue
    except ImportError as error:
        raise ZImageError(f"the server needs more packages ({error}): pip install 'mlx-zimage[server]'") from None
    for origin in origins:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise RequestError(f"--cors takes an origin such as https://app.example, got {origin!r}")
    if control_kind is not None and control_model is None:
        raise RequestError("--control-kind needs --control-model; give both")
    follows = launched_rank() > 0  # in a group of machines, only the first one listens
    access = Access(host, None if follows else _key(api_key_file), frozenset(origins))
    if not follows and not access.loopback and access.key is None and not no_api_key:
        raise RequestError(
            f"--host {host} lets other machines in: give an API key with --api-key-file FILE or {API_KEY}, or pass "
            f"--no-api-key to let anyone generate images"
        )
    budget = None if memory is None else parse_memory(memory)
    models = _named([*sources] or [DEFAULT_MODEL], yes)
    control_model = control_model and _absolute(control_model)
    options = Options(models, lora_dir and lora_dir.resolve(), control_model, control_kind, budget, idle_s)
    if follows:
        from ..server.worker import Follower

        Follower(options).run()
        return
    with listen(host, port) as listener:
        say(f"Opening {', '.join(models)}")
        asyncio.run(serve(listener, Queue(options, limit, deadline_s), access, lora_dir, honor_client_steps, show))


def _key(file: Path | None) -> str | None:
    try:
        key = read_bytes(file, MAX_KEY).decode().strip() if file else os.environ.get(API_KEY, "").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the API key in {file} cannot be read: {error}") from None
    if key is not None and not (key.isascii() and key.isprintable() and len(key) >= 8 and " " not in key):
        where = file or API_KEY
        raise RequestError(f"the API key in {where} must be 8 or more printable ASCII characters without spaces")
    return key


def _named(sources: list[str], yes: bool) -> dict[str, str]:
    """The models to serve, by the names that requests use."""
    from ..weights.hub import name_of

    named: dict[str, str] = {}
    for source in sources:
        local = Path(source).exists()
        name = name_of(Path(source)) if local else source
        if name in named:
            raise RequestError(f"two models are called {name}; rename one of the folders")
        if not local and (source in ALIASES or source == DEFAULT_MODEL):
            source = str(first_run(repository_of(source), yes, launched_rank() > 0))
        named[name] = _absolute(source)
    return named


def _absolute(source: str) -> str:
    """A folder or file by its whole path; anything else as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source
