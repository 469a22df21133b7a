"""What a router reports of itself: totals turned into the shares of an interval. Pure; knows no clock and no Serve."""

from __future__ import annotations

from cluster.fabric.dispatch import DispatchStats
from cluster.stats import RouterStats
from deployments.router.engine import EngineStats


class LoadMeter:
    """Makes `RouterStats`; each reading covers the time since the one before it."""

    def __init__(self, router_id: str) -> None:
        self._id = router_id
        self._step_s = 0.0
        self._critical_s: dict[str, float] = {}

    def read(self, engine: EngineStats, dispatch: DispatchStats) -> RouterStats:
        """The router's load now. No step since the last reading gives no critical shares at all, not zeros."""
        stepped_s = engine.step_s - self._step_s
        critical_s = {name: traffic.critical_s for name, traffic in dispatch.groups.items()}
        shares = {
            name: min(1.0, max(0.0, (total - self._critical_s.get(name, 0.0)) / stepped_s))
            for name, total in critical_s.items()
            if stepped_s > 0
        }
        self._step_s, self._critical_s = engine.step_s, critical_s
        return RouterStats(
            id=self._id,
            running=engine.running,
            waiting=engine.waiting,
            kv_used_tokens=engine.kv_used_tokens,
            transport_bytes=dispatch.transport_bytes,
            group_rows={name: traffic.rows for name, traffic in dispatch.groups.items()},
            critical_share=shares,
        )
