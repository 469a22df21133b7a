"""The page at `/dashboard`: its files from this package, and Plotly's bundle from the installed `plotly`.

None of them holds any data, so none needs a key; `/dashboard/events` does. Everything a browser may load comes from
here: the policy sent with the page forbids the rest. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

PAGE = "index.html"
BUNDLE = "plotly.min.js"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
GZIP_FROM_BYTES = 1024
# Plotly sets styles of elements and adds rules of its own, and draws exported pictures into data: and blob: URLs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Always asked again: an update must show at once. An answer "not modified" has no body.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class _File:
    kind: str
    plain: bytes
    packed: bytes | None
    etag: str


async def page(request: Request) -> Response:
    """`GET /dashboard` and `GET /dashboard/{file}`. Raises HTTPException 404 for a file that there is not."""
    name = request.path_params.get("file", PAGE)
    # The first look reads and packs the bundle: a third of a second.
    file = await asyncio.to_thread(_file, name) if name in _names() else None
    if file is None:
        raise HTTPException(404, f"There is no file {name[:80]!r} here.")
    packed = file.packed is not None and "gzip" in request.headers.get("accept-encoding", "")
    # Two bodies, two tags.
    etag = f'"{file.etag}-gzip"' if packed else f'"{file.etag}"'
    headers = _HEADERS | {"ETag": etag}
    asked = request.headers.get("if-none-match", "")
    if etag in {tag.strip().removeprefix("W/") for tag in asked.split(",")}:
        return Response(status_code=304, headers=headers)
    if packed:
        headers["Content-Encoding"] = "gzip"
    body = file.packed if packed else file.plain
    return Response(body, headers=headers | {"Content-Type": file.kind})


@cache
def _names() -> frozenset[str]:
    """The files there are; a request names one of these or gets nothing."""
    folder = resources.files("deployments.ingress") / "page"
    own = [each.name for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
    return frozenset(name for name in [*own, BUNDLE] if _suffix(name) in KINDS)


@cache
def _file(name: str) -> _File:
    package, folder = ("plotly", "package_data") if name == BUNDLE else ("deployments.ingress", "page")
    plain = (resources.files(package) / folder / name).read_bytes()
    packed = gzip.compress(plain, 6, mtime=0) if len(plain) >= GZIP_FROM_BYTES else None
    return _File(KINDS[_suffix(name)], plain, packed, hashlib.sha256(plain).hexdigest()[:32])


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]
