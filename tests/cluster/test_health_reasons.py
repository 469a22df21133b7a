"""What is wrong with a cluster that still answers: each reason by itself, and none without cause. Milliseconds."""

from __future__ import annotations

import pytest

from cluster.decisions import PolicyReport
from cluster.health_reasons import POLICY_SILENCE_S, STALE_VIEW_S, Heard, Reason, degraded
from cluster.stats import REASON_CHARS

FINE = PolicyReport("p.yaml", version="1")
CASES = {
    Reason.POLICY_FILE: (Heard(PolicyReport("p.yaml", error="budget: no.\ngroups: no.")), "force: budget: no.; groups"),
    Reason.POLICY: (Heard(PolicyReport("p.yaml", failure="KeyError('x')")), "KeyError('x')"),
    Reason.AUTOSCALER: (Heard(FINE, policy_silence_s=POLICY_SILENCE_S + 1), "said nothing for 31 s"),
    Reason.SIGNALS: (Heard(PolicyReport("p.yaml", stalled=("experts-0", "Router"))), "of: experts-0, Router"),
    Reason.BUDGET: (Heard(PolicyReport("p.yaml", no_budget=("budget.cpus: no decision",))), "decided: budget.cpus: no"),
    Reason.DIRECTORY_UPDATES: (Heard(view_age_s={"r2": STALE_VIEW_S + 1, "r1": 0.5}), "directory: r2 for 16 s"),
    Reason.SILENT_ROUTERS: (Heard(silent_s={"r1": 9.6}), "from routers: r1 for 10 s"),
}


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_is_given_alone_and_says_who_and_what(reason: Reason) -> None:
    heard, words = CASES[reason]
    found = degraded(heard)
    assert list(found) == [reason.value]
    assert words in found[reason.value]


@pytest.mark.parametrize(
    "heard",
    [
        Heard(),
        Heard(FINE, policy_silence_s=POLICY_SILENCE_S),
        Heard(FINE, view_age_s={"r1": STALE_VIEW_S}),
        Heard(None, policy_silence_s=1.0),
    ],
)
def test_nothing_is_wrong_without_cause(heard: Heard) -> None:
    assert degraded(heard) == {}


def test_a_long_error_of_a_policy_is_cut() -> None:
    assert len(degraded(Heard(PolicyReport("p.yaml", error="x" * 10_000)))["policy_file"]) == REASON_CHARS
