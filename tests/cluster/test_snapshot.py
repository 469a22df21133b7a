"""The bodies of /v1/cluster and /health, key by key. Milliseconds."""

import json

import pytest

from cluster.config import ExpertsSpec
from cluster.decisions import DecisionRecord, PolicyReport
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous
from cluster.snapshot import cluster_facts, cluster_snapshot, critical_shares, health, ready_replicas, reasons
from cluster.stats import REASON_CHARS, ReplicaStats, RouterStats, StartFailure

DIGEST = "ab" * 32
NODE = Address("node-1", "socket", "127.0.0.1", 7000)


def facts_of(**experts):
    spec = ExpertsSpec(**{"groups": 2, **experts})
    return cluster_facts("demo", DIGEST, contiguous({1: 4, 2: 4}, spec.groups), spec)


def replica(replica_id, group, state=State.READY, pool="default", digest=DIGEST):
    return Replica(replica_id, group, pool, NODE, digest, 1234.56, state)


VIEW = View(Epoch("f00d", 7), (replica("a", "experts-0"), replica("b", "experts-1", State.JOINING)))


ROUTER = RouterStats(
    "r", running=3, waiting=1, kv_used_tokens=640, critical_share={"experts-0": 0.5},
    tokens_generated=90, preemptions=2, ttft_p95_ms=250.06,
)  # fmt: skip


def test_the_snapshot_has_the_shape_the_design_fixes():
    shown = cluster_snapshot(
        facts_of(replicas={"experts-0": 2}),
        VIEW,
        {"a": ReplicaStats(rows=10, utilization=0.25, queue_rows=1)},
        [ROUTER],
        {"stream": 4096},
        {"experts-1": 3, "Router": 1},
    )
    assert json.loads(json.dumps(shown)) == {
        "model": "demo",
        "digest": DIGEST,
        "epoch": {"incarnation": "f00d", "n": 7},
        "transport_bytes": {"stream": 4096, "object_store": 0},
        "groups": [
            {
                "name": "experts-0",
                "experts": {"1": [0, 1], "2": [0, 1]},
                "target_replicas": 2,
                "replicas": [
                    {
                        "id": "a",
                        "state": "ready",
                        "pool": "default",
                        "node": "node-1",
                        "rows": 10,
                        "utilization": 0.25,
                        "critical_share": 0.5,
                        "speed_rows_per_s": 1234.6,
                    }
                ],
                "failures": [],
            },
            {
                "name": "experts-1",
                "experts": {"1": [2, 3], "2": [2, 3]},
                "target_replicas": 3,
                "replicas": [
                    {
                        "id": "b",
                        "state": "joining",
                        "pool": "default",
                        "node": "node-1",
                        "rows": None,
                        "utilization": None,
                        "critical_share": None,
                        "speed_rows_per_s": 1234.6,
                    }
                ],
                "failures": [],
            },
        ],
        "routers": [
            {
                "id": "r",
                "running": 3,
                "waiting": 1,
                "kv_used_tokens": 640,
                "tokens_generated": 90,
                "preemptions": 2,
                "ttft_p95_ms": 250.1,
                "tpot_p95_ms": None,
            }
        ],
        "router_failures": [],
        "decisions": [],
        "policy": None,
    }


def test_decisions_and_the_state_of_the_policy_file_are_shown_as_the_autoscaler_reported_them():
    decision = DecisionRecord(12.3456, "experts-1", "h100", 1, 2, "experts-1: hot, 1 -> 2")
    report = PolicyReport("p.yaml", "abc", 11.0, "budget.gpus: wrong.", ("experts-0: no room",), (decision,))
    shown = cluster_snapshot(facts_of(), VIEW, {}, [], {}, {}, report)
    assert shown["decisions"] == [
        {
            "time": 12.346,
            "group": "experts-1",
            "pool": "h100",
            "from": 1,
            "to": 2,
            "reason": "experts-1: hot, 1 -> 2",
        }
    ]
    assert shown["policy"] == {
        "file": "p.yaml",
        "version": "abc",
        "loaded_at": 11.0,
        "error": "budget.gpus: wrong.",
        "held_back": ["experts-0: no room"],
        "cluster": None,
        "failure": None,
        "stalled": [],
        "no_budget": [],
    }


def test_the_target_of_a_group_is_the_sum_over_its_pools():
    facts = facts_of(replicas=2, pools={"h100": {"replicas": 1}, "l4": {}})
    configured = cluster_snapshot(facts, VIEW, {}, [], {}, {})
    assert [group["target_replicas"] for group in configured["groups"]] == [3, 3]
    asked = cluster_snapshot(facts, VIEW, {}, [], {}, {"experts-0-h100": 4, "experts-0": 0, "experts-1-l4": 1})
    assert [group["target_replicas"] for group in asked["groups"]] == [4, 4]


def test_emulated_replicas_are_marked_with_their_speed_and_others_are_not():
    facts = facts_of(emulate={"rows_per_s": 500}, pools={"h100": {"emulate": {"rows_per_s": 2000}}, "real": {}})
    view = View(VIEW.epoch, tuple(replica(pool, "experts-0", pool=pool) for pool in ("default", "h100", "real")))
    marks = [
        (r["pool"], r.get("emulated"), r.get("emulated_rows_per_s"))
        for r in cluster_snapshot(facts, view, {}, [], {}, {})["groups"][0]["replicas"]
    ]
    assert marks == [("default", True, 500), ("h100", True, 2000), ("real", None, None)]


def test_with_the_local_transport_no_group_is_deployed_and_none_is_missed():
    facts = facts_of(transport="local")
    shown = cluster_snapshot(facts, View(Epoch("f00d", 0)), {}, [RouterStats("r")], {"local": 9}, {})
    assert [(group["target_replicas"], group["replicas"]) for group in shown["groups"]] == [(0, []), (0, [])]
    assert health(facts, View(Epoch("f00d", 0)), [RouterStats("r")]) == (True, [])


def test_routers_that_ran_no_step_have_no_say_in_the_critical_share():
    busy = [RouterStats("a", critical_share={"experts-0": 0.5}), RouterStats("b", critical_share={"experts-0": 0.25})]
    assert critical_shares([*busy, RouterStats("idle")]) == {"experts-0": 0.375}
    assert critical_shares([RouterStats("idle")]) == {}


@pytest.mark.parametrize(
    ("replicas", "routers", "missing"),
    [
        (("experts-0", "experts-1"), 1, []),
        (("experts-0", "experts-1"), 0, ["router"]),
        (("experts-1",), 2, ["experts-0"]),
        ((), 0, ["router", "experts-0", "experts-1"]),
    ],
)
def test_health_names_what_is_missing(replicas, routers, missing):
    view = View(Epoch("f00d", 1), tuple(replica(group, group) for group in replicas))
    ready, found = health(facts_of(), view, [RouterStats(str(index)) for index in range(routers)])
    assert (ready, found) == (not missing, missing)


def test_replicas_that_are_not_ready_or_of_another_model_do_not_make_a_group_healthy():
    others = (
        replica("a", "experts-0", State.DRAINING),
        replica("b", "experts-0", State.JOINING),
        replica("c", "experts-0", digest="cd" * 32),
        replica("d", "experts-1"),
    )
    assert health(facts_of(), View(Epoch("f00d", 1), others), [RouterStats("r")]) == (False, ["experts-0"])


OLD = "cd" * 32
OLD_ROUTER = RouterStats("old", digest=OLD, groups=("experts-0", "experts-1"))


def old_experts(*states):
    return tuple(replica(f"old-{i}", f"experts-{i}", state, digest=OLD) for i, state in enumerate(states))


@pytest.mark.parametrize(
    ("states", "ready"),
    [
        ((State.READY, State.READY), True),
        ((State.READY, State.DRAINING), True),  # told to stop, and waiting for its routers
        ((State.READY, State.JOINING), False),
        ((State.READY,), False),
    ],
)
def test_while_a_new_version_starts_a_whole_old_one_is_healthy(states, ready):
    found = health(facts_of(), View(Epoch("f00d", 1), old_experts(*states)), [OLD_ROUTER])
    assert found == (ready, [] if ready else ["router", "experts-0", "experts-1"])


def test_new_experts_do_not_help_an_old_router():
    new = (replica("a", "experts-0"), replica("b", "experts-1"))
    view = View(Epoch("f00d", 1), new + old_experts(State.READY))
    assert health(facts_of(), view, [OLD_ROUTER]) == (False, ["router"])
    assert health(facts_of(), view, [OLD_ROUTER, RouterStats("new", digest=DIGEST)]) == (True, [])


def test_replicas_of_an_old_version_are_ready_as_long_as_it_answers():
    joining = (replica("new", "experts-0"), replica("new1", "experts-1", State.JOINING))
    starting = View(Epoch("f00d", 1), old_experts(State.READY, State.DRAINING) + joining)
    new = RouterStats("new", digest=DIGEST)
    assert ready_replicas(facts_of(), starting, [OLD_ROUTER]) == {"experts-0": 1, "experts-1": 1}
    assert ready_replicas(facts_of(), starting, [OLD_ROUTER, new]) == {"experts-0": 1, "experts-1": 1}
    assert ready_replicas(facts_of(groups=4), starting, [OLD_ROUTER]) == {"experts-0": 1, "experts-1": 1}
    assert ready_replicas(facts_of(), starting, [new]) == {"experts-0": 1, "experts-1": 0}
    draining = View(Epoch("f00d", 1), (replica("a", "experts-0", State.DRAINING), replica("b", "experts-1")))
    assert ready_replicas(facts_of(), draining, [new]) == {"experts-0": 0, "experts-1": 1}


def test_parts_of_another_version_are_marked_in_the_snapshot_and_ours_are_not():
    view = View(Epoch("f00d", 1), (replica("a", "experts-0"), *old_experts(State.DRAINING)))
    shown = cluster_snapshot(facts_of(), view, {}, [OLD_ROUTER, RouterStats("new", digest=DIGEST)], {}, {})
    marks = {each["id"]: each.get("other_digest") for each in [*shown["groups"][0]["replicas"], *shown["routers"]]}
    assert marks == {"a": None, "old-0": OLD, "new": None, "old": OLD}


def test_failed_starts_are_shown_with_the_group_and_the_last_reason_in_brief():
    failures = {
        "experts-1": [
            StartFailure(1.23456, "experts-1", "experts-1-h100", "first"),
            StartFailure(2.0, "experts-1", "experts-1", "y" * 999),
        ],
        "router": [StartFailure(3.0, "router", "Router", "no memory")],
    }
    shown = cluster_snapshot(facts_of(), VIEW, {}, [], {}, {}, None, failures)
    assert shown["groups"][0]["failures"] == []
    assert shown["groups"][1]["failures"] == [
        {"time": 1.235, "deployment": "experts-1-h100", "reason": "first"},
        {"time": 2.0, "deployment": "experts-1", "reason": "y" * REASON_CHARS},
    ]
    assert [each["reason"] for each in shown["router_failures"]] == ["no memory"]
    assert reasons(failures) == {"experts-1": "y" * REASON_CHARS, "router": "no memory"}
