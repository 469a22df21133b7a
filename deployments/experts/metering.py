"""What an expert replica publishes once a second, of what its server has counted. Pure; knows no Ray and no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.metering import Meter
from cluster.metrics import (
    BATCH_SIZE,
    BATCHES,
    BUSY_S,
    COMPUTED_ROWS,
    CONNECTIONS,
    FFN_S,
    QUEUED_ROWS,
    SPEED,
)

if TYPE_CHECKING:  # they import torch: only replicas pay for that
    from cluster.fabric.server import ServerStats


def tell(meter: Meter, stats: ServerStats, *, speed_rows_per_s: float, group: str, pool: str) -> None:
    """speed_rows_per_s: as the replica announces it."""
    whose = {"group": group, "pool": pool}
    meter.total(COMPUTED_ROWS, stats.rows, **whose)
    meter.total(BUSY_S, stats.busy_s, **whose)
    meter.total(BATCHES, stats.batches, **whose)
    meter.level(QUEUED_ROWS, stats.queue_rows, **whose)
    meter.level(CONNECTIONS, stats.connections, **whose)
    meter.level(SPEED, speed_rows_per_s, **whose)
    meter.spread(BATCH_SIZE, stats.batch_rows, **whose)
    meter.spread(FFN_S, stats.batch_s, **whose)
