"""What one event of the live picture says, from what the cluster said in the last seconds. Pure; knows no clock.

Rates are those of `cluster.rates`. Dimension letters: L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.rates import Rate
from deployments.ingress.clients import Health

ROUTER_KEYS = ("tokens_per_s", "requests_running", "requests_waiting", "ttft_p95_ms", "tpot_p95_ms")


class Picture:
    """Takes what the cluster says and shows it."""

    def __init__(self) -> None:
        self._health = Health(("directory",))
        self._cluster: dict[str, Any] | None = None
        self._tokens = Rate()
        self._rows = Rate()
        self._layers: list[int] = []
        self._seen: dict[str, int] = {}
        self._total = 0

    def take(self, now_s: float, health: Health, cluster: dict[str, Any], loads: dict[str, Any]) -> None:
        """cluster, loads: the bodies of `/v1/cluster` and `/v1/cluster/loads`. now_s: monotonic."""
        self._health, self._cluster = health, cluster
        tokens = {router["id"]: router.get("tokens_generated") or 0 for router in cluster.get("routers", ())}
        # A router that is new here, or was started anew, has no difference yet; one that is gone makes none.
        self._total += sum(max(0, count - self._seen.get(router, count)) for router, count in tokens.items())
        self._seen = tokens
        self._tokens.take(now_s, np.array([self._total], dtype=np.int64))
        self._layers = list(loads["layers"])
        self._rows.take(now_s, _table(loads))

    def shown(self, time_s: float, health: Health | None = None) -> dict[str, Any]:
        """The event at Unix time `time_s`. health: what is wrong, where nobody answers; then no rate is known."""
        now = health or self._health
        return {
            "time": round(time_s, 3),
            "cluster": self._cluster,
            "health": {
                "status": "ok" if now.ready else "unavailable",
                "missing": list(now.missing),
                "reasons": {**now.reasons, **now.degraded},
            },
            "rates": dict.fromkeys(ROUTER_KEYS) if health is not None else self._rates(),
            "heat": self._heat(),
        }

    def _rates(self) -> dict[str, Any]:
        routers = (self._cluster or {}).get("routers", [])
        tokens = self._tokens.per_s()
        return {
            "tokens_per_s": None if tokens is None else round(float(tokens[0]), 1),
            "requests_running": sum(router["running"] for router in routers),
            "requests_waiting": sum(router["waiting"] for router in routers),
            # The slowest router's: percentiles of several cannot be put together.
            "ttft_p95_ms": _worst(routers, "ttft_p95_ms"),
            "tpot_p95_ms": _worst(routers, "tpot_p95_ms"),
        }

    def _heat(self) -> dict[str, Any]:
        """Rows a second of each expert and its group; 0 until there is a second sample, or once nobody answers."""
        rows = self._rows.per_s()
        shape = self._rows.shape
        table = np.zeros(shape) if rows is None else rows
        return {
            "layers": self._layers,
            "experts": shape[1] if self._layers else 0,
            "rows_per_s": [[_rounded(value) for value in layer] for layer in table.tolist()] if self._layers else [],
            "group": self._groups(shape).tolist() if self._layers else [],
        }

    def _groups(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """[L, E], the place of each expert's group in the cluster's list of groups; -1 for an expert there is not."""
        groups = np.full(shape, -1, dtype=np.int64)
        row = {layer: number for number, layer in enumerate(self._layers)}
        for number, group in enumerate((self._cluster or {}).get("groups", [])):
            for layer, ids in group["experts"].items():
                if int(layer) in row:
                    groups[row[int(layer)], [i for i in ids if i < shape[1]]] = number
        return groups


def _table(loads: dict[str, Any]) -> npt.NDArray[np.int64]:
    """[L, E] of all domains together; layers with fewer experts are filled up with 0."""
    widths = [len(layer) for domain in loads["domains"].values() for layer in domain]
    total = np.zeros((len(loads["layers"]), max(widths, default=0)), dtype=np.int64)
    for domain in loads["domains"].values():
        for number, layer in enumerate(domain):
            total[number, : len(layer)] += layer
    return total


def _worst(routers: list[dict[str, Any]], key: str) -> float | None:
    return max((router[key] for router in routers if router.get(key) is not None), default=None)


def _rounded(value: float) -> float:
    """Three figures are all a colour can show; whole numbers from 10 on keep the event small."""
    return round(value) if value >= 10 else round(value, 1) or 0
