"""What is wrong with a cluster that still answers requests: why nobody balances it, or nobody would hear of it.

None of this makes `/health` say 503, as what is missing does (`cluster.snapshot.health`): it is a reason beside a 200,
and a metric. Pure; knows no clock and not who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.decisions import PolicyReport
from cluster.stats import REASON_CHARS

POLICY_SILENCE_S = 30.0
"""The autoscaler speaks every 5 s, waits for no answer longer than 3, and starts within 20 of the Directory."""
STALE_VIEW_S = 15.0
"""Routers hear of the Directory every 5 s at least; one answer may be lost."""
ROUTER_SILENCE_TOLD_S = 60.0
"""Whoever fell silent without a word is either back by then, or replaced."""


class Reason(StrEnum):
    """Every reason there is, in the order of `/health`."""

    POLICY_FILE = "policy_file"
    POLICY = "policy"
    AUTOSCALER = "autoscaler"
    SIGNALS = "signals"
    BUDGET = "budget"
    DIRECTORY_UPDATES = "directory_updates"
    SILENT_ROUTERS = "silent_routers"


@dataclass(frozen=True)
class Heard:
    """What the Directory has heard of those who balance.

    policy: the autoscaler's last report. policy_silence_s: since then, or since the Directory's start; None where
    nobody scales. view_age_s: router -> since it last heard from the Directory, by its own account.
    silent_s: routers that fell silent without a last word -> since when.
    """

    policy: PolicyReport | None = None
    policy_silence_s: float | None = None
    view_age_s: Mapping[str, float] = field(default_factory=dict)
    silent_s: Mapping[str, float] = field(default_factory=dict)


def degraded(heard: Heard) -> dict[str, str]:
    """Reason -> a sentence about it, of those that hold."""
    found: dict[Reason, str] = {}
    if (policy := heard.policy) is not None:
        if policy.error is not None:
            lines = "; ".join(policy.error.splitlines())
            found[Reason.POLICY_FILE] = f"{policy.file} as it is now is not in force: {lines}"
        if policy.failure is not None:
            found[Reason.POLICY] = f"the policy fails, all targets stay as they are: {policy.failure}"
        if policy.stalled:
            parts = ", ".join(policy.stalled)
            found[Reason.SIGNALS] = f"nothing is decided by load, because signals are missing or old, of: {parts}"
        if policy.no_budget:
            found[Reason.BUDGET] = f"nothing is decided: {'; '.join(policy.no_budget)}"
    if heard.policy_silence_s is not None and heard.policy_silence_s > POLICY_SILENCE_S:
        found[Reason.AUTOSCALER] = f"the autoscaler has said nothing for {heard.policy_silence_s:.0f} s"
    if stale := {id: age_s for id, age_s in heard.view_age_s.items() if age_s > STALE_VIEW_S}:
        found[Reason.DIRECTORY_UPDATES] = f"routers do not hear from the directory: {_since(stale)}"
    if heard.silent_s:
        found[Reason.SILENT_ROUTERS] = f"the directory does not hear from routers: {_since(heard.silent_s)}"
    return {reason.value: found[reason][:REASON_CHARS] for reason in Reason if reason in found}


def _since(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} for {for_s:.0f} s" for name, for_s in sorted(seconds.items()))
