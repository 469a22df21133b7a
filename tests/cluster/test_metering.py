"""What a meter makes of totals, levels and counts of buckets, and the task that asks. Milliseconds."""

import asyncio
import logging

import pytest

from cluster.metering import Meter, Publishing, middle
from cluster.metrics import BATCH_ROWS, BATCH_SIZE, KV_TOKENS, MOST_OBSERVED, SENT_ROWS, STEPS
from cluster.tally import Tally
from tests.recorder import Recorder


def test_only_what_a_total_has_risen_is_added():
    recorder = Recorder()
    meter = recorder.meter
    for total in (5, 5, 9):
        meter.total(SENT_ROWS, total, group="experts-0")
    meter.total(SENT_ROWS, 1, group="experts-1")
    assert recorder.of(SENT_ROWS, group="experts-0") == 9
    assert recorder.of(SENT_ROWS, group="experts-1") == 1


def test_a_total_of_nothing_begins_its_series_so_that_the_first_rise_is_one():
    recorder = Recorder()
    meter = recorder.meter
    meter.total(STEPS, 0)
    meter.count(SENT_ROWS, 0, group="experts-0")
    assert (recorder.of(STEPS), recorder.of(SENT_ROWS, group="experts-0")) == (0, 0)
    meter.total(STEPS, 3)
    assert recorder.of(STEPS) == 3


def test_a_total_that_falls_is_a_new_beginning_and_adds_nothing():
    recorder = Recorder()
    meter = recorder.meter
    for total in (5, 2, 4):
        meter.total(STEPS, total)
    assert recorder.of(STEPS) == 7


def test_a_value_on_a_bound_belongs_below_it_as_in_prometheus():
    tally = Tally((1, 2, 4))
    for value in (0.5, 1, 2, 2.1, 4, 5):
        tally.add(value)
    assert tally.counts == [2, 1, 2, 1]


def test_counts_of_buckets_become_values_of_the_same_buckets():
    recorder, tally = Recorder(), Tally(BATCH_ROWS)
    meter = recorder.meter
    rows = [1, 2, 3, 4, 5, 100_000]
    for value in rows:
        tally.add(value)
        meter.spread(BATCH_SIZE, tally.counts, group="g", pool="p")
    again = Tally(BATCH_ROWS)
    for value in recorder.seen(BATCH_SIZE, group="g", pool="p"):
        again.add(value)
    assert again.counts == tally.counts
    assert [middle(BATCH_SIZE, bucket) for bucket in (0, 2, len(BATCH_ROWS))] == [0.5, 3, 2 * BATCH_ROWS[-1]]


def test_too_many_values_are_thinned_evenly_and_rare_ones_are_not_lost():
    recorder, tally = Recorder(), Tally(BATCH_ROWS)
    meter = recorder.meter
    seconds = 40
    for _ in range(seconds):
        for _ in range(990):
            tally.add(16)
        for _ in range(10):
            tally.add(512)
        meter.spread(BATCH_SIZE, tally.counts, group="g", pool="p")
    seen = recorder.seen(BATCH_SIZE, group="g", pool="p")
    assert seconds * MOST_OBSERVED - 2 <= len(seen) <= seconds * MOST_OBSERVED
    assert sum(value > 100 for value in seen) == pytest.approx(0.01 * len(seen), abs=1)


def test_the_recorder_refuses_what_ray_would():
    recorder = Recorder()
    for wrong in (
        lambda meter: meter.level(STEPS, 1),
        lambda meter: meter.count(SENT_ROWS, 1),
        lambda meter: meter.count(SENT_ROWS, 1, group=3),
        lambda meter: meter.level(KV_TOKENS, None),
        lambda meter: meter.level(KV_TOKENS, 1, deployment="Router"),
    ):
        with pytest.raises((ValueError, TypeError)):
            wrong(recorder.meter)


def test_a_source_is_asked_at_once_again_and_a_last_time():
    recorder, asked = Recorder(), []

    async def run() -> None:
        again = asyncio.Event()

        def source(meter: Meter) -> None:
            asked.append(meter)
            if len(asked) == 3:
                again.set()

        publishing = Publishing(source, recorder.meter, period_s=0.001)
        publishing.start()
        await asyncio.wait_for(again.wait(), 5)
        publishing.stop()
        publishing.stop()

    asyncio.run(run())
    assert len(asked) == 4


def test_publishing_that_is_started_twice_asks_once():
    asked = []

    async def run() -> None:
        publishing = Publishing(asked.append, Recorder().meter, period_s=3600)
        publishing.start()
        publishing.start()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(asked) == 1
        publishing.stop()

    asyncio.run(run())


def test_a_source_that_fails_is_asked_again_and_logged_once(caplog):
    def source(_: Meter) -> None:
        raise RuntimeError("no numbers")

    publishing = Publishing(source, Recorder().meter)
    with caplog.at_level(logging.ERROR):
        publishing.turn()
        publishing.turn()
    assert caplog.text.count("metrics cannot be published") == 1
