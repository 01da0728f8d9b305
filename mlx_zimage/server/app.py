"""The application: routes, the guard around them, and the process that serves them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
import webbrowser
from pathlib import Path
from threading import Thread

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import GroupError, ZImageError
from .a1111 import A1111
from .errors import Refusal, answer
from .guard import Access, Guard, Protocol, is_loopback
from .openai import OpenAI
from .queue import Queue
from .service import Service
from .static import routes as page_routes

ANY = ("0.0.0.0", "::")  # every address of this machine
ADVICE = {  # when a port cannot be listened on
    errno.EADDRINUSE: "stop the program that uses it, or choose another --port (0 for any)",
    errno.EACCES: "choose a --port above 1023",
}
log = logging.getLogger(__name__)
CONNECTIONS = 512  # at once; more are answered with 503
SHUTDOWN_S = 3  # for answers in progress


def application(service: Service, access: Access) -> ASGIApp:
    """The server's ASGI application."""

    async def health(request: Request) -> Response:
        queue = service.queue
        waiting = max(0, len(queue.tickets) - (queue.running is not None))
        seconds = queue.estimate()
        return JSONResponse(
            {
                "status": "ok" if queue.process else "restarting",
                "running": queue.running is not None,
                "waiting": waiting,
                "limit": queue.limit,
                "loaded": queue.loaded is not None,
                "estimated_seconds": None if seconds is None else round(seconds, 1),
            }
        )

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        log.info("%s: %d, %s", request.url.path, error.status, error.message)
        return answer(request.scope["path"], error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return answer(request.scope["path"], Refusal(error.status_code, error.detail, headers=headers))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def bug(request: Request, error: Exception) -> Response:
        return answer(request.scope["path"], Refusal(500, "a bug in mlx-zimage; the server's log has more"))

    routes = [*page_routes(), Route("/health", health), *OpenAI(service).routes, *A1111(service).routes]
    handlers = {Refusal: refused, HTTPException: http_error, ClientDisconnect: gone, Exception: bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, access)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 is any that is free. ZImageError if that is impossible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if port and (is_loopback(host) or host in ANY) and is_answered(host, port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener.bind((host, port))
        listener.listen(CONNECTIONS)
    except (OSError, UnicodeError) as error:  # the latter from a name that cannot be looked up
        listener.close()
        why = error.strerror if isinstance(error, OSError) else error
        advice = ADVICE.get(getattr(error, "errno", 0), "--host must be an address or a name of this machine")
        raise ZImageError(f"cannot listen on {host}, port {port}: {why}; {advice}") from error
    return listener


def is_answered(host: str, port: int) -> bool:
    """Whether a program listens there already. macOS lets several programs listen on one port, one on a single address
    and another on all."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def address(listener: socket.socket) -> str:
    """The URL at which a listening socket is reached."""
    return _url(*listener.getsockname()[:2])


def page_address(listener: socket.socket) -> str:
    """The URL of the page for a browser on this machine, which may not accept the address that stands for all
    addresses."""
    host, port = listener.getsockname()[:2]
    return _url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    listener: socket.socket, queue: Queue, access: Access, lora_dir: Path | None, honor_client_steps: bool, show: bool
) -> None:
    """Serve until a signal stops it; `show` opens the page in a browser once the models are open.

    ZImageError, before anything is answered, if the models cannot be opened.
    """
    log_to_stderr()
    try:
        await queue.start()
        service = Service(queue, lora_dir, honor_client_steps)
        config = uvicorn.Config(
            application(service, access),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        print(address(listener), flush=True)
        if show:
            # in a thread, since some browsers make this wait until they exit
            Thread(target=webbrowser.open, args=(page_address(listener),), daemon=True).start()
        server = uvicorn.Server(config)
        ending = asyncio.create_task(_end_when_lost(server, queue))
        await server.serve(sockets=[listener])
        ending.cancel()
        if queue.lost.is_set():
            raise GroupError(f"{queue.why}; start the whole group again")
    finally:
        await queue.stop()


async def _end_when_lost(server: uvicorn.Server, queue: Queue) -> None:
    await queue.lost.wait()
    server.should_exit = True


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger(__package__)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addHandler(handler)
    for others in ("uvicorn.error", "python_multipart"):
        logging.getLogger(others).setLevel(logging.ERROR)
