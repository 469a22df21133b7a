"""What an expert replica publishes of what its server counts: every metric of its section. Milliseconds."""

from __future__ import annotations

from dataclasses import replace

from cluster import metrics
from cluster.fabric.server import ServerStats
from cluster.metrics import BATCH_ROWS, LAYER_SECONDS, sections
from cluster.tally import Tally
from deployments.experts.metering import tell
from tests.recorder import Recorder

OURS = {"group": "experts-1", "pool": "h100"}


def stats(*batches: tuple[int, float]) -> ServerStats:
    """batches: (rows, seconds) of each."""
    rows, seconds = Tally(BATCH_ROWS), Tally(LAYER_SECONDS)
    for each_rows, each_s in batches:
        rows.add(each_rows)
        seconds.add(each_s)
    return ServerStats(
        rows=sum(each for each, _ in batches),
        batches=len(batches),
        frames=len(batches),
        busy_s=sum(each for _, each in batches),
        queue_rows=5,
        connections=3,
        references=0,
        batch_rows=tuple(rows.counts),
        batch_s=tuple(seconds.counts),
    )


def test_every_metric_of_a_replica_is_published_and_no_other() -> None:
    recorder = Recorder()
    tell(recorder.meter, stats((8, 0.25)), speed_rows_per_s=900.0, group="experts-1", pool="h100")
    expected = {metric.name for section, those in sections().items() for metric in those if "expert" in section.by}
    assert recorder.names == expected
    assert recorder.of(metrics.COMPUTED_ROWS, **OURS) == 8
    assert recorder.of(metrics.BUSY_S, **OURS) == 0.25
    assert recorder.of(metrics.BATCHES, **OURS) == 1
    levels = (metrics.QUEUED_ROWS, metrics.CONNECTIONS, metrics.SPEED)
    assert [recorder.of(metric, **OURS) for metric in levels] == [5, 3, 900.0]


def test_each_batch_is_observed_once_in_the_bucket_it_belongs_to() -> None:
    recorder = Recorder()
    meter = recorder.meter
    batches = [(1, 0.0002), (3, 0.004), (3, 0.004)]
    for upto in range(len(batches) + 1):
        tell(meter, stats(*batches[:upto]), speed_rows_per_s=900.0, group="experts-1", pool="h100")
    assert recorder.seen(metrics.BATCH_SIZE, **OURS) == [0.5, 3.0, 3.0]
    assert [0.0001 < s <= 0.005 for s in recorder.seen(metrics.FFN_S, **OURS)] == [True] * 3


def test_an_idle_replica_s_counters_stand_at_0() -> None:
    recorder = Recorder()
    tell(recorder.meter, replace(stats(), queue_rows=0), speed_rows_per_s=900.0, group="experts-1", pool="h100")
    assert [recorder.of(m, **OURS) for m in (metrics.COMPUTED_ROWS, metrics.BUSY_S, metrics.BATCHES)] == [0, 0, 0]
    assert not recorder.observed
