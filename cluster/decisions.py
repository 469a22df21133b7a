"""What the control path says of itself: its last decisions and the state of its policy file, for `/v1/cluster`.

Plain data, sent whole each time, so that a Directory that has restarted lacks nothing. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEPT_DECISIONS = 100
"""How many decisions are remembered."""


@dataclass(frozen=True)
class DecisionRecord:
    """One change of one target. time: Unix seconds. group: of experts, or "Router". before, after: replicas."""

    time: float
    group: str
    pool: str
    before: int
    after: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        """As `/v1/cluster` shows it."""
        return {
            "time": round(self.time, 3),
            "group": self.group,
            "pool": self.pool,
            "from": self.before,
            "to": self.after,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class PolicyReport:
    """The policy in force, and what it decided, oldest first.

    file: as the configuration names it. version: a short hash of the text in force. loaded_at: Unix seconds.
    error: why the file as it is now is not in force; None where it is. held_back: what it would do if it could.
    cluster: what the cluster under it gives, and what is wrong there; None where the policy asks nothing of it.
    failure: why the policy could not decide the last time; None where it could.
    stalled: groups, or "Router", whose signals are too old for a decision, or have long been missing.
    no_budget: why it is not known what the cluster gives, so that nothing is decided; empty where it is.
    """

    file: str
    version: str | None = None
    loaded_at: float | None = None
    error: str | None = None
    held_back: tuple[str, ...] = ()
    decisions: tuple[DecisionRecord, ...] = ()
    cluster: Mapping[str, Any] | None = None
    failure: str | None = None
    stalled: tuple[str, ...] = ()
    no_budget: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The part of `/v1/cluster` beside the decisions."""
        return {
            "file": self.file,
            "version": self.version,
            "loaded_at": self.loaded_at,
            "error": self.error,
            "held_back": list(self.held_back),
            "cluster": self.cluster,
            "failure": self.failure,
            "stalled": list(self.stalled),
            "no_budget": list(self.no_budget),
        }
