"""The policy file as data: frozen pydantic models, validated as a whole. Reading and reloading: `policy_file.py`.

Knows no Ray and no signals. Patterns are those of `fnmatch` ("experts-*"), matched against group names.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PrivateAttr, Tag, model_validator

from autoscale.capacity_spec import KubernetesSpec, PrewarmSpec
from autoscale.cron import check_cron, check_timezone
from cluster.config import Count, Number, Positive, PositiveSeconds, Spec
from cluster.nodes.offers import Resource
from cluster.sentences import Fault, refuse

Account = tuple[str, str | None]
"""A resource, and the pool it is bounded in, None for all pools together."""

Share = Annotated[Number, Field(gt=0, lt=1)]
Seconds = Annotated[Number, Field(ge=0, le=86400)]
Amount = Annotated[Number, Field(ge=0, le=1_000_000)]
AboveZero = Annotated[Number, Field(gt=0)]

# The tags keep pydantic from reporting one error for each alternative; they are no part of the key.
_ALL, _BY_POOL, _GIVEN = "(all pools)", "(by pool)", "(given)"
TAGS = frozenset({_ALL, _BY_POOL, _GIVEN})
_BY_KIND = Discriminator(lambda value: _BY_POOL if isinstance(value, dict) else _ALL)

Source = Literal["cluster", "nodes"]
"""In place of a number: what the cluster can give, by its worker groups' limits, or by the nodes there are now too."""


def _source(value: Any) -> Any:
    if value not in get_args(Source):
        raise ValueError("Input should be a number, pool -> number, 'cluster' or 'nodes'")
    return value


def _amount_kind(value: Any) -> str:
    # A number in quotes is a number, as everywhere.
    if isinstance(value, str) and not value.strip().replace(".", "", 1).isdecimal():
        return _GIVEN
    return _BY_POOL if isinstance(value, dict) else _ALL


_Source = Annotated[Source, BeforeValidator(_source)]
Amounts = Annotated[
    Annotated[Amount, Tag(_ALL)] | Annotated[dict[str, Amount], Tag(_BY_POOL)] | Annotated[_Source, Tag(_GIVEN)],
    Discriminator(_amount_kind),
]
Counts = Annotated[Annotated[Count, Tag(_ALL)] | Annotated[dict[str, Count], Tag(_BY_POOL)], _BY_KIND]


def _one(value: Any) -> Any:
    # Else `true` and `1.0` would pass, which are equal to 1.
    if type(value) is not int:
        raise ValueError("Input should be 1")
    return value


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        refuse([Fault("", list(names), "each pool may be named once")])
    return names


PoolNames = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_different)]


def _ordered(least: int | None, most: int | None, written: set[str], source: str = "") -> list[Fault]:
    """A fault where the bounds contradict each other, at the key that is written; source: who says the other bound."""
    if least is None or most is None or least <= most:
        return []
    if "min_replicas" in written:
        return [Fault("min_replicas", least, f"Input should be from 1 to max_replicas, which is {most}{source}")]
    return [Fault("max_replicas", most, f"Input should be at least min_replicas, which is {least}{source}")]


class Upscale(Spec):
    """after_s: the need must have lasted that long. max_step: replicas added by one decision."""

    after_s: Seconds = 1
    max_step: Positive = 4


class Downscale(Spec):
    """As `Upscale`, downwards. A step of `max_step` each `after_s`, never all at once."""

    after_s: Seconds = 60
    max_step: Positive = 1


class Startup(Spec):
    """budget_s: a replica not ready by then is given up; back-off starts at `backoff_s` and doubles, up to an hour."""

    budget_s: PositiveSeconds = 120
    backoff_s: PositiveSeconds = 120


class Pacing(Spec):
    """How many replicas something may have, and how soon that changes; of a group and of the routers alike.

    hysteresis: how far below its targets the load must stay after a step down, as a share of them.
    """

    min_replicas: Positive = 1
    max_replicas: Positive = 4
    hysteresis: Annotated[Number, Field(ge=0, lt=1)] = 0.15
    upscale: Upscale = Upscale()
    downscale: Downscale = Downscale()
    startup: Startup = Startup()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if faults := _ordered(self.min_replicas, self.max_replicas, self.model_fields_set):
            refuse(faults)
        return self


class ScalingSpec(Pacing):
    """How one group scales. Bounds count its replicas in all pools together.

    target_utilization: busy share aimed at. target_critical_share: share of step time that may be spent waiting for
    this group alone. pools: in which pools it may run; None means in all.
    """

    target_utilization: Share = 0.65
    target_critical_share: Share = 0.15
    pools: PoolNames | None = None


class PoolPolicy(Spec):
    """One pool. cost: of one replica for an hour, in any unit, the same for all pools.

    max_replicas: of all groups together in this pool.
    """

    cost: AboveZero = 1.0
    max_replicas: Count | None = None


class RouterScaling(Pacing):
    """Routers scale by requests, running and waiting, per replica; one with n choices counts n times."""

    target_ongoing_requests: AboveZero = 16


class Slo(Spec):
    """Latency that is promised: 95th percentiles of the time to the first token and per output token."""

    ttft_p95_ms: AboveZero | None = None
    tpot_p95_ms: AboveZero | None = None


class ForecastSpec(Spec):
    """method: `holt` (level and trend) or `none` (the load as it is). horizon_s: how far ahead: one replica start.

    level_tau_s, trend_tau_s: time constants of Holt's two smoothings.
    """

    method: Literal["holt", "none"] = "holt"
    horizon_s: Seconds = 15
    level_tau_s: PositiveSeconds = 2
    trend_tau_s: PositiveSeconds = 10


class BudgetSpec(Spec):
    """What all replicas together may hold at any moment, those that start and those that still drain included.

    gpus, cpus: of routers and expert replicas; replicas: expert replicas only. Each a number, or pool -> number; of
    gpus and cpus also whatever the cluster can give, which is known only once it was asked: see `given`.
    """

    gpus: Amounts | None = None
    cpus: Amounts | None = None
    replicas: Counts | None = None

    _given: Mapping[Account, float] = PrivateAttr(default_factory=dict)

    @property
    def asks(self) -> dict[Resource, Source]:
        """The resources of which the cluster is to say how much there is."""
        asked: dict[Resource, Source] = {}
        if isinstance(self.gpus, str):
            asked["gpus"] = self.gpus
        if isinstance(self.cpus, str):
            asked["cpus"] = self.cpus
        return asked

    def given(self, amounts: Mapping[Account, float]) -> BudgetSpec:
        """This budget once the cluster has said what it can give."""
        copied = self.model_copy()
        copied._given = dict(amounts)
        return copied

    @property
    def limits(self) -> dict[Account, float]:
        """All that is bounded, as numbers."""
        limits: dict[Account, float] = {}
        for resource, bound in (("gpus", self.gpus), ("cpus", self.cpus), ("replicas", self.replicas)):
            if isinstance(bound, str):
                limits |= {account: amount for account, amount in self._given.items() if account[0] == resource}
            elif isinstance(bound, Mapping):
                limits |= {(resource, pool): float(amount) for pool, amount in bound.items()}
            elif bound is not None:
                limits[(resource, None)] = float(bound)
        return limits


_Scaling = TypeVar("_Scaling", ScalingSpec, RouterScaling)


class Bounds(Spec):
    """Bounds that hold while a schedule is active."""

    min_replicas: Positive | None = None
    max_replicas: Positive | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if faults := _ordered(self.min_replicas, self.max_replicas, self.model_fields_set):
            refuse(faults)
        return self

    def applied_to(self, scaling: _Scaling) -> _Scaling:
        """`scaling` within these bounds. A bound that is not given moves where it would contradict one that is."""
        least, most = self.min_replicas or scaling.min_replicas, self.max_replicas or scaling.max_replicas
        if least > most:
            least, most = (least, least) if self.max_replicas is None else (most, most)
        return scaling.model_copy(update={"min_replicas": least, "max_replicas": most})


class ScheduleEntry(Spec):
    """cron: five fields, in `timezone` (an IANA name). Active from each of its moments for `duration_s`.

    groups: pattern -> bounds; the first pattern that matches counts, as with rules.
    """

    cron: Annotated[str, AfterValidator(check_cron)]
    timezone: Annotated[str, AfterValidator(check_timezone)] = "UTC"
    duration_s: Annotated[Number, Field(gt=0, le=7 * 86400)]
    groups: dict[str, Bounds] = Field(default_factory=dict)
    router: Bounds | None = None


class SignalsSpec(Spec):
    """window_s: what rates are averaged over. max_age_s: an older report means no decision.

    Reports come twice a second and are kept for two minutes.
    """

    window_s: Annotated[Number, Field(ge=1, le=120)] = 5
    max_age_s: Annotated[Number, Field(ge=1, le=120)] = 5


class GroupRule(ScalingSpec):
    """`defaults` with changes, for the groups that `match`; the first matching rule counts.

    Only the keys that are written change something: see `PolicySpec.scaling`.
    """

    match: str = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        # A bound alone is to be compared with that of `defaults`: PolicySpec does it.
        written = self.model_fields_set
        if written >= {"min_replicas", "max_replicas"} and (
            faults := _ordered(self.min_replicas, self.max_replicas, written)
        ):
            refuse(faults)
        return self

    def over(self, defaults: ScalingSpec) -> ScalingSpec:
        """`defaults` changed by the keys this rule writes, those of its parts one by one."""
        return defaults.model_copy(update=_written(self, defaults, leave_out="match"))


def _written(part: Spec, base: Spec, leave_out: str = "") -> dict[str, Any]:
    """The keys that `part` writes; a part of it is the part of `base` with what is written there."""
    update: dict[str, Any] = {}
    for key in part.model_fields_set - {leave_out}:
        value, below = getattr(part, key), getattr(base, key)
        inside = isinstance(value, Spec) and isinstance(below, Spec)
        update[key] = below.model_copy(update=_written(value, below)) if inside else value
    return update


class PolicySpec(Spec):
    """A whole policy file."""

    version: Annotated[Literal[1], BeforeValidator(_one)]
    budget: BudgetSpec = BudgetSpec()
    defaults: ScalingSpec = ScalingSpec()
    groups: tuple[GroupRule, ...] = ()
    pools: dict[str, PoolPolicy] = Field(default_factory=dict)
    router: RouterScaling = RouterScaling()
    slo: Slo = Slo()
    forecast: ForecastSpec = ForecastSpec()
    schedule: tuple[ScheduleEntry, ...] = ()
    signals: SignalsSpec = SignalsSpec()
    prewarm: PrewarmSpec | None = None
    kubernetes: KubernetesSpec = KubernetesSpec()

    # The schedule entries of the moment this policy is for: part of what it is, but not of the file.
    _active: tuple[ScheduleEntry, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _rules_fit_the_defaults(self) -> Self:
        faults: list[Fault] = []
        places: dict[str, int] = {}
        for index, rule in enumerate(self.groups):
            merged = rule.over(self.defaults)
            for fault in _ordered(merged.min_replicas, merged.max_replicas, rule.model_fields_set, " by `defaults`"):
                faults.append(Fault(f"groups.{index}.{fault.key}", fault.value, fault.allowed))
            first = places.setdefault(rule.match, index)
            if first < index:
                # The first matching rule counts, so that this one never would.
                faults.append(Fault(f"groups.{index}.match", rule.match, f"groups.{first} has this pattern already"))
        if faults:
            refuse(faults)
        return self

    def rule(self, group: str) -> int | None:
        """The place in `groups` of the rule that counts for `group`; None where none matches."""
        matching = (index for index, rule in enumerate(self.groups) if fnmatchcase(group, rule.match))
        return next(matching, None)

    def scaling(self, group: str) -> ScalingSpec:
        """What holds for `group`: `defaults` changed by what the first matching rule writes.

        Then by the bounds of the schedule entries this policy is `under`. Made once per group, and remembered.
        """
        known = self._scalings.get(group)
        if known is None:
            index = self.rule(group)
            known = self.defaults if index is None else self.groups[index].over(self.defaults)
            for entry in self._active:
                bounds = next((bounds for match, bounds in entry.groups.items() if fnmatchcase(group, match)), None)
                known = known if bounds is None else bounds.applied_to(known)
            self._scalings[group] = known
        return known

    def under(self, entries: tuple[ScheduleEntry, ...]) -> PolicySpec:
        """This policy, as it was read, while `entries` are active: their bounds, one entry after the other.

        Later entries win. A minimum above the group's maximum raises that to it, a maximum below the minimum lowers
        that. For routers it is in `router`, for groups in `scaling`; the file's own `defaults` and `groups` stay.
        """
        router = self.router
        for entry in entries:
            router = router if entry.router is None else entry.router.applied_to(router)
        copied = self.model_copy(update={"router": router})
        copied._active = entries
        return copied

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's own, without what was remembered for the groups: it may no longer hold."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_scalings", None)
        return copied

    @cached_property
    def _scalings(self) -> dict[str, ScalingSpec]:
        return {}
