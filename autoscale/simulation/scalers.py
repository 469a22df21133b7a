"""What decides in the baselines: Serve's own formula, or nothing at all. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoscale.simulation.machines import Machines
from autoscale.simulation.measures import Measures


@dataclass
class Static:
    """Counts stay as they were at the start."""

    needs_groups: bool = False
    reasons: Sequence[str] = ()

    def targets(self, measures: Measures, machines: Machines, now: float) -> Mapping[int, int]:  # noqa: ARG002
        """Nothing changes."""
        return {}


@dataclass(frozen=True)
class OngoingRequests:
    """The parameters of Serve's default policy for one unit; names as in Serve's `AutoscalingConfig`."""

    target_ongoing_requests: float
    min_replicas: int
    max_replicas: int
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_period_s: float


@dataclass
class _Delay:
    """Since when a unit wants to grow (+1) or shrink (-1)."""

    direction: int = 0
    since: float = 0.0


@dataclass
class ServeFormula:
    """Serve's default: replicas = ongoing requests / target, once that has been wanted for the delay.

    As `replica_queue_length_autoscaling_policy` with its delays, of Ray 2.60: any tick that wants nothing, or the
    opposite, starts the delay afresh; then the whole way at once. rules: unit index -> parameters. group_of: unit index
    -> group whose calls in flight count; a unit that has none counts requests in the system.
    """

    rules: Mapping[int, OngoingRequests]
    group_of: Mapping[int, int] = field(default_factory=dict)
    reasons: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._delays = {unit: _Delay() for unit in self.rules}

    @property
    def needs_groups(self) -> bool:
        """Calls in flight are counted per group."""
        return bool(self.group_of)

    def targets(self, measures: Measures, machines: Machines, now: float) -> Mapping[int, int]:
        """One tick of Serve's controller."""
        found: dict[int, int] = {}
        periods = {rule.look_back_period_s for rule in self.rules.values()}
        seen = {period_s: measures.ongoing(period_s) for period_s in periods}
        for unit, rule in self.rules.items():
            known = seen[rule.look_back_period_s]
            if known is None or not machines.ready[unit]:
                continue
            group = self.group_of.get(unit)
            ongoing = known[0] if group is None else float(known[1][group])
            wanted = math.ceil(ongoing / rule.target_ongoing_requests - 1e-9)
            wanted = min(max(wanted, rule.min_replicas), rule.max_replicas)
            target = int(machines.target[unit])
            direction = (wanted > target) - (wanted < target)
            delay = self._delays[unit]
            if direction != delay.direction:
                delay.direction, delay.since = direction, now
            waited = rule.upscale_delay_s if direction > 0 else rule.downscale_delay_s
            if direction and now - delay.since + 1e-9 >= waited:
                found[unit] = wanted
                delay.direction = 0
        return found
