"""What is simulated: the model, the devices, the promise. Two files a user may write, frozen pydantic; knows no time.

A *scenario* says what is assumed (shapes, device speeds, domains); a *calibration* what was measured on a real cluster,
each constant with its source. Scenarios may override what a calibration measured on other devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.config import HOME_POOL, Number, Positive, PositiveSeconds, Spec
from cluster.errors import ConfigError

FOLDER = Path(__file__).parent
CALIBRATION = FOLDER / "calibration.yaml"

Seconds = Annotated[Number, Field(ge=0, le=86400)]
Above0 = Annotated[Number, Field(gt=0, le=1e12)]


class Measured(Spec):
    """One constant and where it is from."""

    value: Annotated[Number, Field(ge=0, le=86400)]
    source: str = Field(min_length=1)


class Calibration(Spec):
    """Constants of the real cluster, in seconds.

    step_s: fixed cost of a router step. token_s: backbone time of one token on one router device. hop_s: scatter and
    gather of one layer beyond the computing. start_s: from a raised target to a ready replica, without its weights.
    start_sigma: spread of its logarithm. report_s: between two reports. delivery_s: from a report to the policy.
    settle_s: as `observer.SETTLE_S`. drain_s: how long a replica that is taken back holds its device.
    """

    name: str
    step_s: Measured
    token_s: Measured
    hop_s: Measured
    start_s: Measured
    start_sigma: Measured
    report_s: Measured
    delivery_s: Measured
    settle_s: Measured
    drain_s: Measured


class Overrides(Spec):
    """Constants of devices other than those that were measured; None: as calibrated."""

    step_s: Seconds | None = None
    token_s: Seconds | None = None
    hop_s: Seconds | None = None
    start_s: Seconds | None = None


class ZipfLoads(Spec):
    """Synthetic expert loads: each domain ranks the experts of a layer its own way, the k-th takes 1 / k^exponent.

    patterns: how many different layers there are; each stands for an equal part of `layers`.
    """

    domains: Annotated[int, Field(ge=1, le=64, strict=True)] = 6
    exponent: Annotated[Number, Field(ge=0, le=4)] = 0.8
    patterns: Annotated[int, Field(ge=1, le=64, strict=True)] = 4


class ModelShape(Spec):
    """layers: with routed experts. top_k: rows of a token per layer. experts: per layer. groups: of experts.

    loads: a load file, relative to the project root, or `zipf`. placement: of ExpertScale; a file, or a name.
    """

    layers: Positive
    top_k: Positive
    experts: Positive
    groups: Positive
    loads: str | ZipfLoads
    placement: str = "by_domain"

    @model_validator(mode="after")
    def _fits(self) -> ModelShape:
        if self.groups > self.experts:
            raise ValueError(f"groups: {self.groups} groups of {self.experts} experts; allowed: 1 to {self.experts}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k} of {self.experts} experts; allowed: 1 to {self.experts}")
        return self


class Drift(Spec):
    """How the mixture of domains moves: in turns of `period_s`, `focus` 0 mixes them evenly, 3 is nearly one alone."""

    period_s: PositiveSeconds = 1800
    focus: Annotated[Number, Field(ge=0, le=20)] = 1.5


class Device(Spec):
    """A kind of device. rows_per_s: of one layer's rows. cost: of a device for an hour, in any unit.

    call_s: fixed time of a replica for each batch (reading its weights from memory), whatever its size; the home pool's
    counts for all.
    """

    rows_per_s: Above0
    cost: Above0 = 1.0
    call_s: Seconds = 0.0


class RouterShape(Spec):
    """One engine: max_sequences at a time, max_batch_tokens in a step. A router replica holds `devices`."""

    max_sequences: Positive = 64
    max_batch_tokens: Positive = 512
    devices: Positive = 1


class Promise(Spec):
    """A request keeps the SLO when its first token comes in `ttft_ms` and the others `tpot_ms` apart on average."""

    ttft_ms: Above0
    tpot_ms: Above0


class Scenario(Spec):
    """Everything about the cluster that is not policy. mtbf_hours: of one device, None: nothing fails.

    tick_s: of the simulation. control_s: between two decisions. weights_s: loading a replica's weights, part of every
    start, of expert replicas and of whole models alike.
    """

    version: Literal[1]
    name: str
    about: str
    model: ModelShape
    pools: dict[str, Device]
    router: RouterShape = RouterShape()
    slo: Promise
    drift: Drift = Drift()
    weights_s: Seconds = 0.0
    mtbf_hours: Above0 | None = None
    tick_s: Annotated[Number, Field(ge=0.05, le=5)] = 0.5
    control_s: Annotated[Number, Field(ge=0.05, le=600)] = 0.5
    max_replicas_hard: Positive = 64
    override: Overrides = Overrides()

    @model_validator(mode="after")
    def _has_home(self) -> Scenario:
        if HOME_POOL not in self.pools:
            raise ValueError(f"pools: {sorted(self.pools)}; needed: one of the name {HOME_POOL!r}")
        return self

    def constants(self, calibration: Calibration) -> dict[str, float]:
        """The calibration's values, with this scenario's overrides."""
        values = {name: float(item.value) for name, item in calibration if isinstance(item, Measured)}
        return values | {name: float(value) for name, value in self.override if value is not None}


File = TypeVar("File", Scenario, Calibration)


def read_scenario(path: Path) -> Scenario:
    """A scenario file, or one of the shipped ones by its bare name (`emulated`).

    Raises:
        ConfigError: one sentence per error, joined by newlines.
    """
    shipped = FOLDER / "scenarios" / f"{path}.yaml"
    return _read(shipped if shipped.exists() and path.name == str(path) else path, Scenario)


def read_calibration(path: Path = CALIBRATION) -> Calibration:
    """A calibration file.

    Raises:
        ConfigError: as `read_scenario`.
    """
    return _read(path, Calibration)


def _read(path: Path, kind: type[File]) -> File:
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"the file {path} is not valid YAML.") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_sentence(item)}" for item in error.errors())) from None


def _sentence(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "the file"
    value = "" if item["type"] == "missing" or isinstance(item["input"], dict) else f"{item['input']!r} is wrong: "
    return f"{key}: {value}{item['msg'].removeprefix('Value error, ')}."
