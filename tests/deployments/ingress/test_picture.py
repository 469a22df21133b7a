"""Rates and heat from totals: differences over a window, restarts, groups of experts, and the size of an event."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from deployments.ingress.clients import Health
from deployments.ingress.picture import Picture


def cluster(**tokens: int) -> dict[str, Any]:
    routers = [
        {"id": name, "running": 2, "waiting": 1, "tokens_generated": count, "ttft_p95_ms": 10.0 * count or None}
        for name, count in tokens.items()
    ]
    groups = [{"experts": {"3": [0, 2], "4": [1]}}, {"experts": {"3": [1], "4": [0, 2]}}]
    return {"groups": groups, "routers": routers}


def loads(*rows: list[int]) -> dict[str, Any]:
    return {"layers": [3, 4], "domains": {"recorded": list(rows)}}


NOTHING = loads([0, 0, 0], [0, 0, 0])


def test_rows_a_second_and_groups_are_by_layer_and_expert() -> None:
    picture = Picture()
    picture.take(10.0, Health(), cluster(), NOTHING)
    picture.take(12.0, Health(), cluster(), loads([8, 0, 1], [0, 1000, 0]))
    heat = picture.shown(0.0)["heat"]
    assert heat["layers"] == [3, 4]
    assert heat["experts"] == 3
    assert heat["rows_per_s"] == [[4.0, 0, 0.5], [0, 500, 0]]
    assert heat["group"] == [[0, 1, 0], [1, 0, 1]]


def test_tokens_a_second_count_routers_that_stay_and_never_fall() -> None:
    picture = Picture()
    picture.take(0.0, Health(), cluster(a=100, b=50), NOTHING)
    picture.take(1.0, Health(), cluster(a=110, c=1_000_000), NOTHING)
    assert picture.shown(0.0)["rates"]["tokens_per_s"] == 10.0
    picture.take(2.0, Health(), cluster(a=3, c=1_000_010), NOTHING)
    assert picture.shown(0.0)["rates"]["tokens_per_s"] == 10.0


def test_levels_are_sums_and_the_latency_is_the_slowest_router_s() -> None:
    picture = Picture()
    picture.take(0.0, Health(), cluster(a=1, b=7, c=0), NOTHING)
    rates = picture.shown(0.0)["rates"]
    assert (rates["requests_running"], rates["requests_waiting"]) == (6, 3)
    assert (rates["ttft_p95_ms"], rates["tpot_p95_ms"]) == (70.0, None)


def test_what_is_wrong_although_requests_are_answered_is_shown_as_a_reason() -> None:
    picture = Picture()
    picture.take(0.0, Health(reasons={"experts-1": "no disk"}, degraded={"signals": "too old"}), cluster(a=1), NOTHING)
    assert picture.shown(0.0)["health"] == {
        "status": "ok",
        "missing": [],
        "reasons": {"experts-1": "no disk", "signals": "too old"},
    }


def test_an_event_of_a_large_model_stays_small() -> None:
    layers, experts, groups = 61, 256, 8
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 400, (layers, experts))
    members = {str(layer): list(range(experts)) for layer in range(layers)}
    shown = {"groups": [{"experts": {k: v[g::groups] for k, v in members.items()}} for g in range(groups)]}
    told = {"layers": list(range(layers)), "domains": {"recorded": [[0] * experts for _ in range(layers)]}}
    picture = Picture()
    picture.take(0.0, Health(), shown, told)
    picture.take(1.0, Health(), shown, told | {"domains": {"recorded": rows.tolist()}})
    size = {key: len(json.dumps(value, separators=(",", ":"))) for key, value in picture.shown(0.0)["heat"].items()}
    assert size["rows_per_s"] < 5 * layers * experts
    assert size["group"] < 3 * layers * experts
