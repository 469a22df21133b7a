"""A small server for the page: its real files, and a cluster that does what a test says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.ingress import dashboard

GROUPS = 4
PERIOD_S = 0.15


class PageServer:
    """Attributes are the script: a test sets them, the next event shows them. template: whether chats are answered.

    used: the experts that each chunk of an answer names, in turn.
    """

    def __init__(self, layers: int = 6, experts: int = 32) -> None:
        self.layers, self.experts = layers, experts
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/dashboard"
        self.load, self.decided_s = 0.0, time.time()
        self.states = ["ready"] * GROUPS
        self.ids = [f"g{n}#a1b2c3" for n in range(GROUPS)]
        self.node, self.reason, self.word = "node-1", "busy 0.91 over 0.70 for 30 s", "An answer. "
        self.key = ""
        self.used = [{"2": [0, 9]}, {"2": [1, 9]}, {"2": [2, 9]}]
        self.template, self.words = True, 3
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve on the same port as ever."""
        routes = [
            Route("/dashboard", dashboard.page),
            Route("/dashboard/events", self._events),
            Route("/dashboard/{file}", dashboard.page),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_level="error", ws="none", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Close everything, open streams too."""
        assert self._server is not None
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join()

    def event(self) -> dict[str, Any]:
        """What the page is shown now."""
        wide = self.experts // GROUPS
        layers, experts = range(self.layers), range(self.experts)
        rows = [[round(self.load * (1 + (7 * e + 3 * n) % 23), 1) for e in experts] for n in layers]
        missing = [f"g{n}" for n, state in enumerate(self.states) if state != "ready"]
        decision = {"time": self.decided_s, "group": "g1", "pool": "home", "from": 1, "to": 2, "reason": self.reason}
        return {
            "time": time.time(),
            "cluster": {
                "model": "demo-moe",
                "groups": [self._group(n, state) for n, state in enumerate(self.states)],
                "routers": [],
                "decisions": [decision],
            },
            "health": {
                "status": "unavailable" if missing else "ok",
                "missing": missing,
                "reasons": dict.fromkeys(missing, self.reason),
            },
            "rates": {
                "tokens_per_s": 40 * self.load,
                "requests_running": 3,
                "requests_waiting": 0,
                "ttft_p95_ms": 81.5,
                "tpot_p95_ms": None,
            },
            "heat": {
                "layers": [n + 1 for n in layers],
                "experts": self.experts,
                "rows_per_s": rows,
                "group": [[e // wide for e in experts] for _ in layers],
            },
        }

    def _group(self, number: int, state: str) -> dict[str, Any]:
        replica = {
            "id": self.ids[number],
            "state": state,
            "pool": "home",
            "node": self.node,
            "rows": 120,
            "utilization": min(1.0, self.load / 4),
            "critical_share": 0.12,
            "speed_rows_per_s": 5210.4,
        }
        return {"name": f"g{number}", "experts": {}, "target_replicas": 1, "replicas": [replica], "failures": []}

    def _refused(self, request: Request) -> bool:
        return bool(self.key) and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _events(self, request: Request) -> Response:
        if self._refused(request):
            return JSONResponse({"error": {"message": "A key, please."}}, 401)

        async def told() -> AsyncGenerator[str, None]:
            yield "retry: 1000\n\n"
            while self._server is not None and not self._server.should_exit:
                yield f"id: 1\ndata: {json.dumps(self.event())}\n\n"
                await asyncio.sleep(PERIOD_S)

        return StreamingResponse(told(), media_type="text/event-stream")

    async def _chat(self, request: Request) -> Response:
        if self._refused(request):
            return JSONResponse({"error": {"message": "A key, please."}}, 401)
        if not self.template:
            return JSONResponse({"error": {"message": "None.", "code": "no_chat_template"}}, 400)
        return self._answer(request, lambda text: {"delta": {"content": text}})

    async def _completion(self, request: Request) -> Response:
        return self._answer(request, lambda text: {"text": text})

    def _answer(self, request: Request, choice: Any) -> Response:
        asked = request.headers.get("x-expertscale-experts") == "true"

        async def told() -> AsyncGenerator[str, None]:
            for number in range(self.words):
                chunk = {"choices": [choice(self.word)]} | (
                    {"experts": self.used[number % len(self.used)]} if asked else {}
                )
                yield f"data: {json.dumps(chunk)}\n\n"
                await asyncio.sleep(0.02)
            yield "data: [DONE]\n\n"

        return StreamingResponse(told(), media_type="text/event-stream")
