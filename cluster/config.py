"""Every knob of a deployment: frozen pydantic models, the `args` of the Serve application.

Paths are kept as written; `resolve` makes them absolute against the project root (`EXPERTSCALE_ROOT`, by default the
checkout). Errors name the key, the value and what is allowed. Knows no Ray and no torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.errors import ConfigError
from cluster.sentences import sentences

DType = Literal["auto", "float32", "bfloat16", "float16"]
TransportName = Literal["stream", "object_store", "auto", "local"]
POOL_NAME = re.compile(r"[a-z]([a-z0-9]{0,30})")

HOME_POOL = "default"


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a valid number")
    return value


# Strict, because YAML's `yes` and `4.5` would otherwise pass as 1 and fail without naming the type.
Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
PositiveSeconds = Annotated[Number, Field(gt=0, le=86400)]
VariableName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]{0,99}$")]

# The tags keep pydantic from reporting one error for each alternative; they are no part of the key.
_COUNT, _BY_GROUP, _ELASTIC = "(count)", "(by group)", "(elastic)"
TAGS = frozenset({_COUNT, _BY_GROUP, _ELASTIC})
ELASTIC: Literal["elastic"] = "elastic"
"""In place of a number of replicas: the policy file decides."""


def _elastic_only(value: Any) -> Any:
    if value != ELASTIC:
        raise ValueError(f"Input should be a number of replicas or {ELASTIC!r}")
    return value


def _kind(value: Any) -> str:
    return _BY_GROUP if isinstance(value, dict) else _ELASTIC if isinstance(value, str) else _COUNT


def _count_kind(value: Any) -> str:
    return _BY_GROUP if isinstance(value, dict) else _COUNT


_Elastic = Annotated[Literal["elastic"], BeforeValidator(_elastic_only)]
Replicas = Annotated[
    Annotated[Positive, Tag(_COUNT)] | Annotated[dict[str, Count], Tag(_BY_GROUP)] | Annotated[_Elastic, Tag(_ELASTIC)],
    Discriminator(_kind),
]
PoolReplicas = Annotated[
    Annotated[Count, Tag(_COUNT)] | Annotated[dict[str, Count], Tag(_BY_GROUP)], Discriminator(_count_kind)
]
RouterReplicas = Annotated[Annotated[Positive, Tag(_COUNT)] | Annotated[_Elastic, Tag(_ELASTIC)], Discriminator(_kind)]


def deployment_name(group: str, pool: str = HOME_POOL) -> str:
    """The Serve deployment that runs `group` in `pool`: `experts-0`, or `experts-0-h100` in pool `h100`."""
    return group if pool == HOME_POOL else f"{group}-{pool}"


class Spec(BaseModel):
    """Base of every part: immutable, and an unknown key is an error rather than a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResourceSpec(Spec):
    """What one replica asks of Ray; the names are Ray's own."""

    num_cpus: Number = Field(default=0.1, ge=0)
    num_gpus: Number = Field(default=0, ge=0)
    memory: Positive | None = Field(default=None, description="bytes")
    accelerator_type: str | None = None
    label_selector: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, float] = Field(default_factory=dict)

    def ray_actor_options(self) -> dict[str, Any]:
        """The `ray_actor_options` of a Serve deployment."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        for name in ("memory", "accelerator_type", "label_selector", "resources"):
            if value := getattr(self, name):
                options[name] = value
        return options


class ModelSpec(Spec):
    """Which checkpoint, under which name, in which arithmetic."""

    path: str = Field(min_length=1)
    name: str | None = Field(
        default=None, min_length=1, description="what clients call it; by default the folder's name"
    )
    dtype: DType = "auto"

    @property
    def served_name(self) -> str:
        """The name in `/v1/models`."""
        return self.name or resolve(self.path).name


class PlacementSpec(Spec):
    """Experts to groups: `contiguous` by index, `balanced` or `hot_aligned` from loads, `explicit` from a file.

    `balanced`: groups of equal load. `hot_aligned`: every layer's hottest experts together, for more replicas of them.
    """

    strategy: Literal["contiguous", "balanced", "hot_aligned", "explicit"] = "contiguous"
    file: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"strategy": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _file_where_needed(self) -> PlacementSpec:
        if (self.strategy != "contiguous") != (self.file is not None):
            need = "needs" if self.file is None else "takes no"
            raise ValueError(f"strategy {self.strategy!r} {need} `file`")
        return self


class EmulateSpec(Spec):
    """Answer no faster than a device that computes `rows_per_s` rows of one expert layer a second would."""

    rows_per_s: Number = Field(gt=0)


class PoolSpec(Spec):
    """One kind of device on which every group may also run, as deployments `experts-N-POOL`.

    replicas: copies of every group in this pool, or per group by name; groups that are not named have none here.
    """

    resources: ResourceSpec = ResourceSpec()
    emulate: EmulateSpec | None = None
    replicas: PoolReplicas = 0


class ExpertsSpec(Spec):
    """The expert groups and how rows reach them.

    replicas: copies of every group in the default pool, or per group by name (one where it is not named, 0 where its
        only replicas are in other pools), or `elastic`: the policy file decides, from one in the default pool and none
        in the others up to max_replicas_hard in each.
    wait_s: how long a step waits for a missing group before its requests fail with 503.
    timeout_s: silence after which one batch of rows is sent to another replica.
    hedge_after: a batch that takes this many times the usual time is also sent to a second replica, and the first
        answer counts; null for never.
    auto_threshold_bytes: bytes of one layer's hidden states from which `auto` prefers the object store.
    host: the address expert replicas listen on for other nodes; "node" means the address Ray knows the node by.
    """

    groups: Positive = 4
    placement: PlacementSpec = PlacementSpec()
    transport: TransportName = "stream"
    replicas: Replicas = 1
    wait_s: PositiveSeconds = 30
    timeout_s: PositiveSeconds = 10
    hedge_after: Annotated[Number, Field(ge=1.5)] | None = 3
    auto_threshold_bytes: Positive = 32 << 20
    max_replicas_hard: Positive = 8
    emulate: EmulateSpec | None = None
    host: str = Field(default="127.0.0.1", min_length=1)
    resources: ResourceSpec = ResourceSpec()
    pools: dict[str, PoolSpec] = Field(default_factory=dict)

    @field_validator("pools")
    @classmethod
    def _pool_names(cls, pools: dict[str, PoolSpec]) -> dict[str, PoolSpec]:
        for name in pools:
            if not POOL_NAME.fullmatch(name) or name == HOME_POOL:
                raise ValueError(f"pool name {name!r}: use lower-case letters and digits, and not {HOME_POOL!r}")
        return pools

    @model_validator(mode="after")
    def _replicas_name_groups(self) -> ExpertsSpec:
        keys = {HOME_POOL: "replicas", **{name: f"pools.{name}.replicas" for name in self.pools}}
        asked = {HOME_POOL: self.replicas, **{name: pool.replicas for name, pool in self.pools.items()}}
        for pool, key in keys.items():
            for name in by_group if isinstance(by_group := asked[pool], dict) else ():
                if name not in self.group_names:
                    raise ValueError(
                        f"`{key}` names {name!r}, but the groups are experts-0 to experts-{self.groups - 1}"
                    )
        if self.elastic and any(pool.replicas for pool in self.pools.values()):
            raise ValueError("`replicas` is 'elastic', so no pool can have `replicas` of its own; leave them out")
        for pool, key in keys.items():
            count = max(self.replicas_of(group, pool) for group in self.group_names)
            if count > self.max_replicas_hard:
                raise ValueError(f"`{key}` is {count}; allowed: up to max_replicas_hard ({self.max_replicas_hard})")
        for group in self.group_names:
            if not any(self.replicas_of(group, pool) for pool in keys):
                raise ValueError(f"{group!r} has no replica in any pool; allowed: at least one somewhere")
        return self

    @property
    def group_names(self) -> tuple[str, ...]:
        """`experts-0` ... in order of group index."""
        return tuple(f"experts-{index}" for index in range(self.groups))

    def replicas_of(self, group: str, pool: str = HOME_POOL) -> int:
        """Copies of `group` in `pool`; where they are elastic, the fewest."""
        asked = self.replicas if pool == HOME_POOL else self.pools[pool].replicas
        fewest = 1 if pool == HOME_POOL else 0
        if isinstance(asked, str):
            return fewest
        return asked.get(group, fewest) if isinstance(asked, dict) else asked

    @property
    def elastic(self) -> bool:
        """Whether a policy decides how many replicas there are."""
        return self.replicas == ELASTIC


class RouterSpec(Spec):
    """The routers and their engines.

    replicas: how many, or `elastic`: the policy file decides, from 1 to experts.max_replicas_hard.
    max_batch_tokens: tokens of one step, prefill chunks included. max_sequences: sequences in one step.
    kv_tokens: tokens the KV pool of one router holds, in pages of 16: what does not fill one would be promised in vain.
    max_queued_requests: waiting beyond that is answered 429.
    max_wait_share: so is a request that would wait for its start longer than this share of what a usual request takes.
    chunks_per_s: messages of tokens one router sends a second, shared by its streams: the more, the larger.
    batch_invariant: a row's result does not depend on what else is in the batch, bit for bit, at a cost in speed.
    """

    replicas: RouterReplicas = 1
    max_batch_tokens: Positive = 512
    max_sequences: Positive = 64
    kv_tokens: int = Field(default=32768, ge=16, multiple_of=16, strict=True)
    max_queued_requests: Positive = 256
    max_wait_share: Annotated[Number, Field(gt=0)] = 0.75
    chunks_per_s: Positive = 160
    batch_invariant: bool = False
    resources: ResourceSpec = ResourceSpec()

    @property
    def elastic(self) -> bool:
        """Whether a policy decides how many routers there are."""
        return self.replicas == ELASTIC

    @model_validator(mode="after")
    def _every_sequence_decodes(self) -> RouterSpec:
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) is below max_sequences ({self.max_sequences}): "
                "each running sequence needs one token a step"
            )
        return self


class IngressSpec(Spec):
    """The HTTP front.

    max_body_bytes: larger request bodies are answered 413.
    request_timeout_s: from acceptance to the last token at most; requests may ask for less.
    silence_s: a router that says nothing about a request for longer hangs; its streams go on at another one.
    """

    replicas: Positive = 1
    max_body_bytes: Positive = 4 << 20
    request_timeout_s: PositiveSeconds = 600
    silence_s: PositiveSeconds = 5
    resources: ResourceSpec = ResourceSpec()


class SecuritySpec(Spec):
    """Where secrets are, never secrets: the application's arguments are readable through Serve's API.

    api_keys_file, admin_keys_file: hashed keys, one a line (`python -m deployments.ingress.keys` makes them).
    api_keys_env, admin_keys_env: instead of a file, the environment variable that holds these lines.
    allow_open: answer on other addresses than loopback though no API key is asked for.
    cluster_key_file: the key routers and expert replicas prove to each other; made on the first start where missing.
    cluster_key_env: the variable that holds this key; counts where no file is named.
    """

    api_keys_file: str | None = None
    api_keys_env: VariableName | None = None
    admin_keys_file: str | None = None
    admin_keys_env: VariableName | None = None
    allow_open: bool = False
    cluster_key_file: str | None = None
    cluster_key_env: VariableName = "EXPERTSCALE_CLUSTER_KEY"

    @model_validator(mode="after")
    def _one_source_each(self) -> SecuritySpec:
        for kind in ("api_keys", "admin_keys"):
            if getattr(self, f"{kind}_file") is not None and getattr(self, f"{kind}_env") is not None:
                raise ValueError(f"`{kind}_file` and `{kind}_env` are both given; leave one of them out")
        return self

    @property
    def asks_for_keys(self) -> bool:
        """Whether clients need an API key."""
        return self.api_keys_file is not None or self.api_keys_env is not None


class AppConfig(Spec):
    """The `args` of the Serve application `deployments.app:build`."""

    model: ModelSpec
    experts: ExpertsSpec = ExpertsSpec()
    router: RouterSpec = RouterSpec()
    ingress: IngressSpec = IngressSpec()
    security: SecuritySpec = SecuritySpec()


def project_root() -> Path:
    """The folder relative paths start from: `EXPERTSCALE_ROOT`, by default the checkout."""
    return Path(os.environ.get("EXPERTSCALE_ROOT") or Path(__file__).resolve().parent.parent)


def resolve(path: str) -> Path:
    """`path` as an absolute path, relative ones against `project_root()`."""
    return (project_root() / path).absolute()


def parse_args(args: Any) -> AppConfig:
    """Validate application arguments.

    Raises:
        ConfigError: one sentence per error, joined by newlines.
    """
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, AppConfig, name="args", tags=TAGS))) from None
