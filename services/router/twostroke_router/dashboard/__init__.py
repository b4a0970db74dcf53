"""The live page at `/`: a handful of static files, read once. It asks the router's own API, as any client does."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"
HEADERS = {
    # Nothing but what this router serves: no inline script or style, no other host, no frame around the page.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class _Asset:
    """One file, and how it is answered."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._headers = {
            **HEADERS,
            "ETag": f'"{sha256(content).hexdigest()[:32]}"',
            "Content-Type": CONTENT_TYPES[PurePath(name).suffix],
        }

    async def answer(self, request: Request) -> Response:
        """The file, or 304 for a browser that has it."""
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def dashboard_routes() -> list[Route]:
    """`/` and, under `/dashboard/`, what the page is made of."""
    folder = files(__name__) / "static"
    found = [entry for entry in folder.iterdir() if PurePath(entry.name).suffix in CONTENT_TYPES]
    assets = {entry.name: _Asset(entry.name, entry.read_bytes()) for entry in found}
    index = assets.pop(INDEX)
    return [
        Route("/", index.answer),
        *(Route(f"/dashboard/{name}", asset.answer) for name, asset in assets.items()),
    ]
