"""The load plan: which checkpoint tensors make each expert's weights, and how an expert computes. Plain data.

Compiled once by `cluster.checkpoint.compile_plan`, which has transformers; executed by expert replicas, which do not
import it. Knows no file contents, no placement of its own, and no model types.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from cluster.errors import CheckpointError
from cluster.placement import Placement

EXPERT = "{expert}"
"""Stands for the expert's index in a source's key."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FfnSpec:
    """How one expert computes: up projection, activation, down projection.

    gated: the up projection is [gate; up] of width 2I, else of width I.
    interleaved: gate and up alternate instead of lying side by side.
    transposed: weights lie as [E, in, out] instead of [E, out, in].
    bias: both projections have one.
    activation: a name of `cluster.activation.FUNCTIONS`, or "swish", x * sigmoid(alpha * x).
    limit: gate is clamped to at most it, up to within plus and minus it; None for no clamp.
    limit_after: the gate's clamp comes after the activation.
    up_offset: added to up before gate and up are multiplied.
    upcast: gate and up are multiplied in float32.
    fallback: "module:class" of the transformers class whose own activation must be called because none of the above
        expresses it; such a replica imports transformers.
    """

    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    activation: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    limit_after: bool = False
    up_offset: float = 0.0
    upcast: bool = False
    fallback: str | None = None

    @property
    def up_name(self) -> str:
        """The parameter that holds the first projection."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of all parameters of a layer's experts."""
        weights = (self.up_name, "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.bias else weights


@dataclass(frozen=True)
class Source:
    """Checkpoint tensors that give one piece of every expert's parameter.

    key: name in the checkpoint; where not fused, `EXPERT` stands for the expert's index.
    fused: one tensor holds all experts along dimension 0.
    files: indices into `LoadPlan.files`, one per expert, or just one where fused.
    """

    key: str
    fused: bool
    files: tuple[int, ...]

    def locate(self, expert: int) -> tuple[str, int]:
        """Key and file index of the tensor that holds `expert`."""
        return (self.key, self.files[0]) if self.fused else (self.key.replace(EXPERT, str(expert)), self.files[expert])


@dataclass(frozen=True)
class Operation:
    """One step from an expert's pieces to its parameter; dimensions are those of one expert's tensor.

    concatenate: all pieces along dims[0]. transpose: every piece's dims[0] and dims[1].
    """

    name: Literal["concatenate", "transpose"]
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one parameter of one layer comes about. shape: of one expert's tensor, without the expert dimension."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer. layer: decoder layer number; module: name of its experts module in the model.

    hidden: width of the rows that go to an expert and come back.
    """

    layer: int
    module: str
    num_experts: int
    hidden: int
    spec: FfnSpec
    parameters: dict[str, Recipe]


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: name relative to the checkpoint folder, size in bytes.

    content: hex SHA-256 over its header and samples of its contents, see `cluster.shards.content_samples`.
    """

    name: str
    size_bytes: int
    content: str = ""


@validated(frozen=True, config=_STRICT)
class LoadPlan:
    """A checkpoint as the cluster sees it.

    dtype: resolved arithmetic, float32, bfloat16 or float16.
    max_context: most tokens of one sequence; context_reason: why it is less than the model's own limit, if it is.
    config: hex SHA-256 of config.json.
    fingerprint: hex SHA-256 over this plan, and with it over config.json and samples of the checkpoint's contents.
    """

    model_type: str
    dtype: Literal["float32", "bfloat16", "float16"]
    layers: dict[int, LayerPlan]
    files: tuple[ShardFile, ...]
    max_context: int
    context_reason: str | None = None
    fingerprint: str = ""
    config: str = ""

    @property
    def experts_per_layer(self) -> dict[int, int]:
        """Layer -> number of routed experts, for the layers that have any."""
        return {layer: plan.num_experts for layer, plan in self.layers.items()}

    def to_json(self) -> str:
        """Canonical text: equal plans give equal text."""
        return _adapter().dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> LoadPlan:
        """The plan that `to_json` wrote.

        Raises:
            CheckpointError: `text` is no load plan.
        """
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "top level"
            raise CheckpointError(f"this is not a load plan: {where}: {first['msg']}.") from None

    def with_fingerprint(self) -> LoadPlan:
        """This plan with its fingerprint, over everything else in it."""
        digest = hashlib.sha256(replace(self, fingerprint="").to_json().encode())
        return replace(self, fingerprint=digest.hexdigest())


@cache
def _adapter() -> TypeAdapter[LoadPlan]:
    return TypeAdapter(LoadPlan)


def model_digest(plan: LoadPlan, placement: Placement, *, dtype: str, wire_version: int) -> bytes:
    """32 bytes that agree only between parts that serve the same weights, cut the same way, over the same wire.

    dtype: the arithmetic rows travel in, as a name such as "float32".
    """
    digest = hashlib.sha256()
    for part in (plan.fingerprint, placement.as_json(), dtype, str(wire_version)):
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()
