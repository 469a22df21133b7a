"""When schedule entries hold: time zones, clocks put on and back, midnight, month ends. A few seconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale import schedule
from autoscale.cron import check_timezone, started_within
from autoscale.schedule import Schedule, in_force
from autoscale.spec import PolicySpec

BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"
HOUR = 3600


def policy(*entries: dict[str, Any]) -> PolicySpec:
    return PolicySpec.model_validate({"version": 1, "schedule": list(entries)})


def entry(cron: str, duration_s: float = HOUR, timezone: str = "UTC", least: int = 2) -> dict[str, Any]:
    bounds = {"min_replicas": least}
    return {
        "cron": cron,
        "duration_s": duration_s,
        "timezone": timezone,
        "groups": {"experts-*": bounds},
        "router": bounds,
    }


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def is_active(spec: PolicySpec, at: datetime) -> bool:
    """Whether some entry bounds groups and routers at `at`; both or neither."""
    bounded = in_force(spec, at)
    found = {bounded.scaling("experts-0").min_replicas > 1, bounded.router.min_replicas > 1}
    assert len(found) == 1
    return found.pop()


def spans(spec: PolicySpec, first: str, last: str, step: timedelta = timedelta(minutes=1)) -> list[tuple[str, str]]:
    """The spans in [first, last], UTC, in which an entry is active, as "HH:MM" of begin and end."""
    found: list[tuple[str, str]] = []
    at, since, schedule_ = utc(first), None, Schedule(spec)
    while at <= utc(last):
        active = schedule_.in_force(at) is not spec
        if active and since is None:
            since = at
        elif not active and since is not None:
            found.append((f"{since:%H:%M}", f"{at:%H:%M}"))
            since = None
        at += step
    assert since is None, "still active at the end"
    return found


def test_an_entry_holds_from_its_moment_for_its_duration_the_end_excluded() -> None:
    spec = policy(entry("0 8 * * MON-FRI", 10 * HOUR))
    monday = "2026-03-02T"
    assert not is_active(spec, utc(f"{monday}07:59:59.999999"))
    assert is_active(spec, utc(f"{monday}08:00"))
    assert is_active(spec, utc(f"{monday}17:59:59.999999"))
    assert not is_active(spec, utc(f"{monday}18:00"))
    assert not is_active(spec, utc("2026-03-01T12:00"))  # Sunday


def test_the_moment_counts_not_the_zone_it_is_told_in() -> None:
    spec = policy(entry("0 8 * * *", timezone=NEW_YORK))
    at = datetime(2026, 7, 1, 14, 30, tzinfo=ZoneInfo(BERLIN))
    assert is_active(spec, at)
    assert is_active(spec, at.astimezone(UTC))
    assert not is_active(spec, at + timedelta(hours=1))


def test_a_moment_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        in_force(policy(), datetime(2026, 1, 1))


@pytest.mark.parametrize(
    ("name", "zone", "cron", "day", "expected"),
    [
        # Berlin puts clocks on at 01:00 UTC (02:00 becomes 03:00) and back at 01:00 UTC (03:00 becomes 02:00).
        ("winter", BERLIN, "0 8 * * *", "2026-01-15", [("07:00", "08:00")]),
        ("summer", BERLIN, "0 8 * * *", "2026-07-15", [("06:00", "07:00")]),
        ("skipped hour", BERLIN, "30 2 * * *", "2026-03-29", [("01:00", "02:00")]),
        ("day before", BERLIN, "30 2 * * *", "2026-03-28", [("01:30", "02:30")]),
        ("across the skip", BERLIN, "30 1 29 3 *", "2026-03-29", [("00:30", "01:30")]),
        ("repeated hour", BERLIN, "30 2 * * *", "2026-10-25", [("00:30", "01:30")]),
        ("every hour", BERLIN, "30 * * * *", "2026-10-25", [("00:00", "00:15")]),
        # New York: 07:00 UTC (02:00 becomes 03:00), and back at 06:00 UTC (02:00 becomes 01:00).
        ("skipped hour", NEW_YORK, "30 2 * * *", "2026-03-08", [("07:00", "08:00")]),
        ("repeated hour", NEW_YORK, "30 1 * * *", "2026-11-01", [("05:30", "06:30")]),
        ("half an hour put on", "Australia/Lord_Howe", "15 2 * * *", "2026-10-03", [("15:30", "16:30")]),
        ("midnight skipped", "Africa/Cairo", "30 0 * * *", "2026-04-23", [("22:00", "23:00")]),
    ],
)
def test_clocks_put_on_or_back_make_an_entry_come_once(
    name: str, zone: str, cron: str, day: str, expected: list[tuple[str, str]]
) -> None:
    if name == "every hour":
        # With a star in the hour it goes by elapsed time: in both of the repeated hours.
        starts = spans(policy(entry(cron, 15 * 60, zone)), f"{day}T00:00", f"{day}T04:00")
        assert starts == [(f"0{hour}:30", f"0{hour}:45") for hour in range(4)]
        return
    assert spans(policy(entry(cron, HOUR, zone)), f"{day}T00:00", f"{day}T23:59") == expected


def test_a_span_goes_on_across_midnight_and_across_a_change_of_clocks() -> None:
    night = policy(entry("0 22 * * SAT", 8 * HOUR, BERLIN))
    # 22:00 in winter, eight hours of elapsed time later it is 07:00 in summer.
    assert spans(night, "2026-03-28T12:00", "2026-03-29T12:00") == [("21:00", "05:00")]
    assert spans(night, "2026-02-28T12:00", "2026-03-01T12:00") == [("21:00", "05:00")]


@pytest.mark.parametrize(
    ("cron", "active", "inactive"),
    [
        ("0 0 L * *", ["2026-02-28", "2028-02-29", "2026-04-30"], ["2028-02-28", "2026-03-30", "2026-05-01"]),
        ("0 0 31 * *", ["2026-01-31", "2026-03-31"], ["2026-02-28", "2026-03-01", "2026-03-03", "2026-04-30"]),
        ("0 0 29 2 *", ["2028-02-29"], ["2027-02-28", "2027-03-01", "2100-03-01"]),
        ("0 0 1 1 *", ["2027-01-01"], ["2026-12-31", "2027-01-02"]),
        ("0 0 13 * FRI", ["2026-10-13", "2026-10-16"], ["2026-10-14"]),  # cron's "or" of two days that are given
    ],
)
def test_months_end_when_they_end(cron: str, active: list[str], inactive: list[str]) -> None:
    spec = policy(entry(cron, 24 * HOUR))
    assert [day for day in active if not is_active(spec, utc(f"{day}T12:00"))] == []
    assert [day for day in inactive if is_active(spec, utc(f"{day}T12:00"))] == []


def test_an_entry_that_starts_again_while_it_is_active_goes_on() -> None:
    spec = policy(entry("*/10 8 * * *", 15 * 60))
    assert spans(spec, "2026-03-02T00:00", "2026-03-02T23:00") == [("08:00", "09:05")]


def test_later_entries_win() -> None:
    spec = policy(entry("0 8 * * *", 2 * HOUR, least=2), entry("0 9 * * *", 2 * HOUR, least=3))
    minima = [
        in_force(spec, utc(f"2026-03-02T{hour:02}:30")).scaling("experts-0").min_replicas for hour in range(7, 12)
    ]
    assert minima == [1, 2, 3, 3, 1]


def test_a_span_may_end_within_a_minute() -> None:
    timetable = Schedule(policy(entry("0 8 * * *", 90.5)))
    minima = [
        timetable.in_force(utc(f"2026-03-02T08:{rest}")).router.min_replicas
        for rest in ("00:00", "01:00", "01:30.4", "01:30.5", "01:31")
    ]
    assert minima == [2, 2, 2, 1, 1]


def test_entries_are_looked_at_once_a_minute_and_the_same_policy_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(*args: Any) -> datetime | None:
        looks.append(args)
        return started_within(*args)

    monkeypatch.setattr(schedule, "started_within", counted)
    spec = policy(entry("0 8 * * *"))
    timetable = Schedule(spec)
    at = utc("2026-03-02T07:58:00")
    found = [timetable.in_force(at + timedelta(seconds=tick / 9)) for tick in range(9 * 240)]
    assert len(looks) == 4
    assert all(one is spec for one in found[: 9 * 120])
    assert all(one is found[-1] for one in found[9 * 120 :])
    assert found[-1] is not spec


def test_without_entries_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "started_within", None)
    spec = policy()
    assert Schedule(spec).in_force(utc("2026-01-01")) is spec


def test_a_moment_that_jumps_back_is_answered_as_if_it_were_the_first() -> None:
    spec = policy(entry("0 8 * * *"))
    timetable = Schedule(spec)
    for at in ("08:30:30", "08:30:10", "07:59:59", "08:00:00", "09:00:00", "08:59:59"):
        moment = utc(f"2026-03-02T{at}")
        assert timetable.in_force(moment) == in_force(spec, moment)


ZONES = st.sampled_from(
    [
        "UTC",
        BERLIN,
        NEW_YORK,
        "Australia/Lord_Howe",
        "America/Sao_Paulo",
        "Africa/Cairo",
        "Asia/Kathmandu",
        "Etc/GMT+12",
    ]
)
CRONS = st.sampled_from(
    [
        "0 8 * * *",
        "30 2 * * *",
        "*/7 * * * *",
        "0 0 L * *",
        "59 23 * * SUN",
        "0 0 29 2 *",
        "15 1,2,3 * 3,10,11 *",
        "0 0 * * 1#5",
    ]
)
MOMENTS = st.datetimes(datetime(1975, 1, 1), datetime(2100, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))


@settings(deadline=None)
@given(
    entries=st.lists(st.tuples(CRONS, ZONES, st.sampled_from([1, 59.5, 3600, 604800])), max_size=3),
    start=MOMENTS,
    steps=st.lists(st.floats(-7200, 7200), max_size=8),
)
def test_one_schedule_over_time_answers_as_a_fresh_one_would(
    entries: list[tuple[str, str, float]], start: datetime, steps: list[float]
) -> None:
    spec = policy(*(entry(cron, duration, zone) for cron, zone, duration in entries))
    timetable, at = Schedule(spec), start
    for step in [0.0, *steps]:
        at += timedelta(seconds=step)
        assert timetable.in_force(at) == in_force(spec, at)


@settings(deadline=None)
@given(cron=st.sampled_from(["30 2 * * *", "0 0 * * *", "30 1 * * *"]), zone=ZONES, at=MOMENTS)
def test_a_moment_of_cron_is_found_where_every_minute_is_tried(cron: str, zone: str, at: datetime) -> None:
    minute, hour = (int(field) for field in cron.split()[:2])
    span, local = timedelta(hours=3), ZoneInfo(check_timezone(zone))
    tried = [at.replace(second=0, microsecond=0) - timedelta(minutes=back) for back in range(181)]
    there = [one.astimezone(local) for one in tried if at - span < one <= at]
    expected = [one for one in there if (one.hour, one.minute, one.fold) == (hour, minute, 0)]
    found = started_within(cron, zone, at, span)
    if expected:
        assert found == min(expected)
    elif found is not None:
        # Not on the clock of that day: the hour was skipped, and the moment is when the clocks were put on.
        before = (found - timedelta(minutes=1)).astimezone(local)
        assert found.astimezone(local).utcoffset() > before.utcoffset()  # type: ignore[operator]


@pytest.mark.parametrize("at", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
def test_the_ends_of_the_calendar_are_no_error(at: datetime) -> None:
    spec = policy(*(entry("0 0 1 1 *", 604800, zone) for zone in ("UTC", BERLIN, NEW_YORK)))
    assert in_force(spec, at).version == 1
