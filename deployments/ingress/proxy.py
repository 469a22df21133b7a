"""What Serve wraps the application of its HTTP proxies in: one id for each request, and an end for stalled clients.

Serve calls `middlewares` in every proxy where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it (`serve.env`).
Imported by processes that serve no model: keep it light.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from deployments.ingress.request_ids import RequestIds
from deployments.ingress.stalled import CutOff, stalled_s


def middlewares() -> list[Middleware]:
    """The last one stands next to the socket. Serve's own, which tells the id with every answer, stands inside.

    Raises:
        ValueError: as of `stalled_s`.
    """
    return [Middleware(RequestIds, tell=False), Middleware(CutOff, stalled_s=stalled_s())]
