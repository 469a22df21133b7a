"""A policy file is refused with key, value and what is allowed, or in force; and it is followed. A few seconds."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale.policy_file import LOOK_S, SETTLED_S, PolicyFile, main, read
from autoscale.spec import PolicySpec
from cluster.errors import ConfigError

EIGHT_WEEKDAYS = {"cron": "0 8 * * MON-FRI", "duration_s": 60}
RULE: dict[str, Any] = {"match": "experts-0"}


def with_parts(**parts: Any) -> dict[str, Any]:
    return {"version": 1, **parts}


def schedule(**parts: Any) -> dict[str, Any]:
    return with_parts(schedule=[{**EIGHT_WEEKDAYS, **parts}])


INVALID: list[tuple[dict[str, Any], str, str, str]] = [
    # (policy, key, value, what is allowed)
    ({}, "version", "missing", "allowed: 1"),
    ({"version": 2}, "version", "2", "Input should be 1"),
    ({"version": True}, "version", "True", "Input should be 1"),
    ({"version": 1.0}, "version", "1.0", "Input should be 1"),
    ({"version": "1"}, "version", "'1'", "Input should be 1"),
    (
        with_parts(default={}),
        "default",
        "unknown key",
        "defaults, forecast, groups, kubernetes, pools, prewarm, router",
    ),
    (with_parts(defaults={"max": 3}), "defaults.max", "unknown key", "downscale, hysteresis, max_replicas"),
    (with_parts(defaults=3), "defaults", "3", "a valid dictionary"),
    (with_parts(defaults={"min_replicas": 0}), "defaults.min_replicas", "0", "greater than or equal to 1"),
    (with_parts(defaults={"max_replicas": 2.5}), "defaults.max_replicas", "2.5", "integer greater than or equal to 1"),
    (with_parts(defaults={"max_replicas": True}), "defaults.max_replicas", "True", "integer greater than or equal"),
    (with_parts(defaults={"min_replicas": 5}), "defaults.min_replicas", "5", "from 1 to max_replicas, which is 4"),
    (
        with_parts(defaults={"target_utilization": 1}),
        "defaults.target_utilization",
        "1",
        "greater than 0 and less than 1",
    ),
    (
        with_parts(defaults={"target_utilization": "high"}),
        "defaults.target_utilization",
        "'high'",
        "a valid number greater than 0 and less than 1",
    ),
    (
        with_parts(defaults={"target_critical_share": False}),
        "defaults.target_critical_share",
        "False",
        "a valid number greater than 0 and less than 1",
    ),
    (
        with_parts(defaults={"hysteresis": math.nan}),
        "defaults.hysteresis",
        "nan",
        "a finite number greater than or equal to 0 and less than 1",
    ),
    (
        with_parts(defaults={"upscale": {"after_s": math.inf}}),
        "defaults.upscale.after_s",
        "inf",
        "greater than or equal to 0 and less than or equal to 86400",
    ),
    (
        with_parts(defaults={"downscale": {"max_step": 0}}),
        "defaults.downscale.max_step",
        "0",
        "greater than or equal to 1",
    ),
    (
        with_parts(router={"startup": {"budget_s": 0}}),
        "router.startup.budget_s",
        "0",
        "greater than 0 and less than or equal to 86400",
    ),
    (with_parts(defaults={"pools": []}), "defaults.pools", "[]", "at least 1 item"),
    (with_parts(defaults={"pools": ["a", "a"]}), "defaults.pools", "['a', 'a']", "each pool may be named once"),
    (with_parts(groups=[{}]), "groups.0.match", "missing", "no default"),
    (with_parts(groups=[{"match": ""}]), "groups.0.match", "''", "at least 1 character"),
    (with_parts(groups=[RULE, RULE]), "groups.1.match", "'experts-0'", "groups.0 has this pattern already"),
    (
        with_parts(defaults={"max_replicas": 3}, groups=[{**RULE, "min_replicas": 4}]),
        "groups.0.min_replicas",
        "4",
        "from 1 to max_replicas, which is 3 by `defaults`",
    ),
    (
        with_parts(defaults={"min_replicas": 3}, groups=[{**RULE, "max_replicas": 2}]),
        "groups.0.max_replicas",
        "2",
        "at least min_replicas, which is 3 by `defaults`",
    ),
    (
        with_parts(groups=[{**RULE, "min_replicas": 9, "max_replicas": 8}]),
        "groups.0.min_replicas",
        "9",
        "from 1 to max_replicas, which is 8",
    ),
    (with_parts(pools={"h100": {"cost": 0}}), "pools.h100.cost", "0", "greater than 0."),
    (with_parts(pools={"h100": {"max_replicas": -1}}), "pools.h100.max_replicas", "-1", "greater than or equal to 0"),
    (with_parts(pools={"h100": {"price": 1}}), "pools.h100.price", "unknown key", "cost, max_replicas"),
    (with_parts(budget={"gpus": -1}), "budget.gpus", "-1", "greater than or equal to 0 and less than or equal to"),
    (with_parts(budget={"cpus": {"h100": "x"}}), "budget.cpus.h100", "'x'", "a valid number greater than or equal to"),
    (with_parts(budget={"replicas": 2.5}), "budget.replicas", "2.5", "a valid integer greater than or equal to 0"),
    (with_parts(budget={"replicas": [8]}), "budget.replicas", "[8]", "a valid integer greater than or equal to 0"),
    (with_parts(router={"max_replicas": 0}), "router.max_replicas", "0", "greater than or equal to 1"),
    (with_parts(router={"min_replicas": 5}), "router.min_replicas", "5", "from 1 to max_replicas, which is 4"),
    (with_parts(router={"target_ongoing_requests": 0}), "router.target_ongoing_requests", "0", "greater than 0."),
    (with_parts(slo={"ttft_p95_ms": 0}), "slo.ttft_p95_ms", "0", "greater than 0."),
    (with_parts(forecast={"method": "magic"}), "forecast.method", "'magic'", "'holt' or 'none'"),
    (
        with_parts(forecast={"horizon_s": 86401}),
        "forecast.horizon_s",
        "86401",
        "greater than or equal to 0 and less than or equal to 86400",
    ),
    (with_parts(forecast={"trend_tau_s": 0}), "forecast.trend_tau_s", "0", "greater than 0 and less than or equal to"),
    (
        with_parts(signals={"max_age_s": -1}),
        "signals.max_age_s",
        "-1",
        "greater than or equal to 1 and less than or equal to 120",
    ),
    (schedule(cron="0 25 * * *"), "schedule.0.cron", "'0 25 * * *'", "five cron fields"),
    (schedule(cron="0 0 8 * * *"), "schedule.0.cron", "'0 0 8 * * *'", "five cron fields"),
    (schedule(cron="@daily"), "schedule.0.cron", "'@daily'", "five cron fields"),
    (schedule(cron="0 0 30 2 *"), "schedule.0.cron", "'0 0 30 2 *'", "that some moment matches"),
    (schedule(cron=8), "schedule.0.cron", "8", "a valid string"),
    (schedule(timezone="Europe/Bern"), "schedule.0.timezone", "'Europe/Bern'", "IANA time zone"),
    (schedule(timezone="../../etc/passwd"), "schedule.0.timezone", "'../../etc/passwd'", "IANA time zone"),
    (schedule(duration_s=0), "schedule.0.duration_s", "0", "greater than 0 and less than or equal to 604800"),
    (
        schedule(groups={"experts-*": {"min_replicas": 3, "max_replicas": 2}}),
        "schedule.0.groups.experts-*.min_replicas",
        "3",
        "from 1 to max_replicas, which is 2",
    ),
    (
        schedule(groups={"experts-*": {"replicas": 3}}),
        "schedule.0.groups.experts-*.replicas",
        "unknown key",
        "max_replicas, min_replicas",
    ),
    (
        schedule(router={"min_replicas": None, "max_replicas": 0}),
        "schedule.0.router.max_replicas",
        "0",
        "or equal to 1",
    ),
    (with_parts(schedule=[{"cron": "* * * * *"}]), "schedule.0.duration_s", "missing", "greater than 0 and less than"),
]


def write(folder: Path, document: object) -> Path:
    path = folder / "policy.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, allow_unicode=True))
    return path


def errors_in(folder: Path, document: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(write(folder, document))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("document", "key", "value", "allowed"), INVALID)
def test_a_wrong_value_is_one_sentence_naming_key_value_and_what_is_allowed(
    tmp_path: Path, document: dict[str, Any], key: str, value: str, allowed: str
) -> None:
    (sentence,) = errors_in(tmp_path, document)
    assert sentence.startswith((f"{key}: the value {value} is not allowed: ", f"{key}: {value}"))
    assert allowed in sentence
    assert sentence.endswith(".")


def test_errors_are_reported_all_at_once_and_at_most_twenty(tmp_path: Path) -> None:
    document = with_parts(version=3, router={"min_replicas": 0}, slo={"x": 1})
    assert [line.split(":")[0] for line in errors_in(tmp_path, document)] == ["version", "router.min_replicas", "slo.x"]
    lines = errors_in(tmp_path, with_parts(**{f"key{index}": 1 for index in range(500)}))
    assert (len(lines), lines[-1]) == (21, "policy: 480 more errors like these.")


def test_odd_keys_and_huge_values_stay_one_short_line(tmp_path: Path) -> None:
    document = {"version": "x" * 100_000, "a\nb": 1, "y" * 10_000: 2, 7: 3}
    lines = errors_in(tmp_path, document)
    assert len(lines) == 4
    assert all(len(line) < 400 for line in lines)
    assert "digits" in errors_in(tmp_path, f"version: 1\nslo: {{ttft_p95_ms: 0x{'f' * 20_000}}}")[0]


@pytest.mark.parametrize(("name", "words"), [("none.yaml", "No such file"), (".", "no regular file"), ("a\0b", "null")])
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^the file cannot be read: .*{words}.*allowed: a YAML file.*\\.$"):
        read(f"{tmp_path}/{name}")


def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        read(tmp_path / "pipe")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-10, 10)
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=8)
    | st.sampled_from(["experts-*", "holt", "0 8 * * *", "Europe/Berlin", "UTC"])
)
KEYS = st.sampled_from(
    [
        *PolicySpec.model_fields,
        *(
            "min_replicas",
            "max_replicas",
            "match",
            "upscale",
            "after_s",
            "max_step",
            "cost",
            "gpus",
            "replicas",
            "cron",
        ),
        *("duration_s", "timezone", "method", "pools", "window_s", "default"),
    ]
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(document=JUNK | st.dictionaries(KEYS, JUNK, max_size=5).map(lambda parts: {"version": 1} | parts))
def test_whatever_yaml_can_say_is_a_policy_or_a_configuration_error(tmp_path: Path, document: object) -> None:
    spec: PolicySpec | None
    try:
        spec, lines = read(write(tmp_path, document)), []
    except ConfigError as error:
        spec, lines = None, str(error).splitlines()
    if spec is None:
        assert lines
        assert all(line.endswith(".") for line in lines)
    else:
        assert spec.scaling("experts-0").min_replicas <= spec.scaling("experts-0").max_replicas


class Times:
    """A clock that rises and a wall clock, both set by hand. The files' own times are set to match."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.unix = 1_000_000.0

    def write(self, document: object, *, aged_s: float = 10.0) -> None:
        write(self.path.parent, document)
        self.age(aged_s)

    def age(self, aged_s: float) -> None:
        os.utime(self.path, (self.unix - aged_s, self.unix - aged_s))

    def follow(self, **more: Any) -> PolicyFile:
        return PolicyFile(self.path, clock=lambda: self.now, wall=lambda: self.unix, **more)

    def later(self, seconds: float = LOOK_S) -> None:
        self.now += seconds
        self.unix += seconds


@pytest.fixture
def times(tmp_path: Path) -> Times:
    return Times(tmp_path / "policy.yaml")


def most(file: PolicyFile) -> int | None:
    return None if file.spec is None else file.spec.defaults.max_replicas


def replicas(count: object) -> dict[str, Any]:
    return with_parts(defaults={"max_replicas": count})


def test_an_edit_is_in_force_at_the_next_look(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow()
    first = file.version_hash
    assert (most(file), file.error, file.loaded_at) == (5, None, times.unix)
    assert first
    times.later()
    assert not file.refresh()
    times.later()
    times.write(replicas(6), aged_s=5)
    assert file.refresh()
    assert (most(file), file.loaded_at) == (6, times.unix)
    assert file.version_hash != first


def test_the_file_is_looked_at_no_more_often_than_it_must(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times.write(replicas(5))
    file = times.follow()
    calls = {"stat": 0, "open": 0}

    def counting(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += args[0] == times.path
            return real(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, counting(name))
    for _ in range(90):
        times.later(1 / 9)
        assert not file.refresh()
    # Each fifth call: 5/9 s is the first multiple of 1/9 s beyond the half second.
    assert calls == {"stat": 18, "open": 0}


def test_a_clock_that_jumps_back_delays_no_look(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow()
    times.now = -1000.0
    times.write(replicas(6), aged_s=5)
    assert file.refresh()


def test_an_invalid_edit_leaves_the_old_policy_in_force_and_says_why(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow()
    version, loaded_at = file.version_hash, file.loaded_at
    times.later()
    times.write(replicas(0), aged_s=5)
    assert not file.refresh()
    assert (most(file), file.version_hash, file.loaded_at) == (5, version, loaded_at)
    assert file.error == (
        "defaults.max_replicas: the value 0 is not allowed: Input should be greater than or equal to 1."
    )
    times.later()
    times.write(replicas(5), aged_s=4)
    assert not file.refresh()
    assert (file.error, file.version_hash, file.loaded_at) == (None, version, loaded_at)


def test_without_a_valid_file_there_is_no_policy_until_there_is_one(times: Times) -> None:
    file = times.follow()
    assert (file.spec, file.version_hash, file.loaded_at) == (None, None, None)
    assert "No such file" in str(file.error)
    times.later()
    times.write("version: 1\ndefaults: {max_", aged_s=0)
    assert not file.refresh()
    assert "not valid YAML" in str(file.error)
    times.later()
    times.write(replicas(7), aged_s=0)
    assert file.refresh()
    assert (most(file), file.error) == (7, None)


def test_a_second_edit_within_one_tick_of_the_file_systems_clock_is_seen(times: Times) -> None:
    times.write(replicas(5), aged_s=0)
    file = times.follow()
    stamp = os.stat(times.path)
    for count in (6, 7):
        times.later()
        times.path.write_text(times.path.read_text().replace(str(count - 1), str(count)))
        os.utime(times.path, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
        assert os.stat(times.path).st_size == stamp.st_size
        assert file.refresh()
        assert most(file) == count


def test_a_write_to_a_file_that_has_rested_is_seen_even_if_it_keeps_size_and_mtime(times: Times) -> None:
    times.write(replicas(5), aged_s=0)
    file = times.follow()
    times.later(SETTLED_S)
    assert not file.refresh()
    stamp = os.stat(times.path)
    times.path.write_text(times.path.read_text().replace("5", "6"))
    os.utime(times.path, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    times.later()
    assert file.refresh(), "its ctime has changed, which nobody can set"
    assert most(file) == 6


def test_a_file_that_is_replaced_by_renaming_is_seen_whatever_its_times(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow()
    stamp = os.stat(times.path)
    aside = times.path.with_suffix(".new")
    aside.write_text(times.path.read_text().replace("5", "6"))
    os.utime(aside, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    aside.replace(times.path)
    times.later()
    assert file.refresh()
    assert most(file) == 6


def test_links_are_followed_as_a_configmap_swaps_them(tmp_path: Path) -> None:
    times = Times(tmp_path / "mounted" / "policy.yaml")
    for version, count in (("v1", 5), ("v2", 6)):
        (tmp_path / "mounted" / version).mkdir(parents=True)
        (tmp_path / "mounted" / version / "policy.yaml").write_text(yaml.safe_dump(replicas(count)))
        os.utime(tmp_path / "mounted" / version / "policy.yaml", (1, 1))
    data = tmp_path / "mounted" / "..data"
    data.symlink_to("v1")
    times.path.symlink_to("..data/policy.yaml")
    file = times.follow()
    assert most(file) == 5
    swapped = tmp_path / "mounted" / "..data_tmp"
    swapped.symlink_to("v2")
    swapped.replace(data)
    times.later()
    assert file.refresh()
    assert most(file) == 6


def test_a_file_that_is_gone_for_a_moment_changes_nothing(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow()
    version = file.version_hash
    times.path.unlink()
    times.later()
    assert not file.refresh()
    assert most(file) == 5
    assert "No such file" in str(file.error)
    times.later()
    times.write(replicas(5))
    assert not file.refresh()
    assert (file.error, file.version_hash) == (None, version)


def test_a_policy_that_asks_in_vain_is_refused(times: Times) -> None:
    times.write(replicas(5))
    file = times.follow(check=lambda spec: ["too many."] if spec.defaults.max_replicas > 5 else [])
    assert (most(file), file.error) == (5, None)
    times.later()
    times.write(replicas(6), aged_s=5)
    assert not file.refresh()
    assert (most(file), file.error) == (5, "too many.")


def test_a_check_that_fails_refuses_the_policy_and_raises_nothing(times: Times) -> None:
    def fails(_spec: PolicySpec) -> Iterator[str]:
        raise ZeroDivisionError("nothing to divide by")

    times.write(replicas(5))
    file = times.follow(check=fails)
    assert file.spec is None
    assert "nothing to divide by" in str(file.error)


def test_acceptance_and_refusal_are_logged_once_each(times: Times, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="autoscale.policy_file")
    times.write(replicas(5), aged_s=0)
    file = times.follow()
    for count in (0, -1, 6):
        times.write(replicas(count), aged_s=0)
        for _ in range(20):
            times.later(0.1)
            file.refresh()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING", "INFO"]
    assert "stays in force: defaults.max_replicas: the value 0" in caplog.records[1].getMessage()
    assert str(file.version_hash) in caplog.records[3].getMessage()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(steps=st.lists(st.sampled_from(["valid", "other", "invalid", "gone", "folder", "wait", "back"]), max_size=12))
def test_whatever_happens_to_the_file_refresh_never_raises_and_keeps_the_last_valid_policy(
    tmp_path: Path, steps: list[str]
) -> None:
    times = Times(tmp_path / "policy.yaml")
    _remove(times.path)
    file, expected = times.follow(), None
    for step in steps:
        if step in ("valid", "other", "invalid", "gone", "folder"):
            _remove(times.path)
        if step in ("valid", "other", "invalid"):
            expected = {"valid": 5, "other": 6}.get(step, expected)
            times.write(replicas({"valid": 5, "other": 6, "invalid": 0}[step]), aged_s=0)
        elif step == "folder":
            times.path.mkdir()
        times.later(-3 if step == "back" else LOOK_S)
        file.refresh()
        assert most(file) == expected
        good = times.path.is_file() and "max_replicas: 0" not in times.path.read_text()
        assert (file.error is None) == good


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_the_command_says_ok_or_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, with_parts())
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: ok\n"
    write(tmp_path, {"version": 2})
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().err == "version: the value 2 is not allowed: Input should be 1.\n"
    assert main(["read", str(path)]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autoscale.policy_file", "check", str(write(tmp_path, {"version": 2}))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "version: the value 2 is not allowed: Input should be 1.\n")
