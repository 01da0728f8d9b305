"""The page at /: files that are served as they are, under a policy that lets a browser load nothing else."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a newer version's files must not be mixed with these
}


def routes() -> list[Route]:
    """The page, and its files under /page/, which need no key: they are the same for everyone."""
    files = {file.name: file for file in FOLDER.iterdir() if file.suffix in MEDIA}

    def answer(name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise HTTPException(404)
        return Response(file.read_bytes(), media_type=MEDIA[file.suffix], headers=HEADERS)

    async def page(request: Request) -> Response:
        return answer("page.html")

    async def part(request: Request) -> Response:
        return answer(request.path_params["name"])

    return [Route("/", page), Route("/page/{name}", part)]
