"""One router at work: backbone, dispatcher and engine put together. Without Ray.

Knows no Serve and no directory; `deployment.py` wraps it for Serve, tests and benchmarks run it in plain processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cluster.blueprint import Blueprint
from cluster.config import ExpertsSpec, RouterSpec
from cluster.fabric.auto import AutoTransport
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.local import Compute, LocalTransport
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import Transport
from cluster.membership import Address, Epoch, Replica, State, View
from deployments.experts.ffn import expert_ffn
from deployments.experts.weights import GroupWeights, ProgressBar, load_group
from deployments.router.backbone import load_backbone
from deployments.router.engine import Engine
from deployments.router.experts_used import ExpertRecord
from deployments.router.routing import RoutingRecord
from deployments.router.tracing import StepSpans
from deployments.router.vitals import COMPUTE_S, Vitals

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

PAGE_TOKENS = 16


class RouterRuntime:
    """Loads the model without its experts and runs the engine until `stop`.

    key: the cluster key. node: as in `ExpertReplica`. on_lost: told the id of a replica that broke; must not raise.
    tracer: None where traces are off.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        experts: ExpertsSpec,
        router: RouterSpec,
        *,
        key: bytes,
        node: str,
        device: str = "cpu",
        on_lost: Callable[[str], None] = lambda _: None,
        tracer: Tracer | None = None,
    ) -> None:
        plan = blueprint.plan
        self._transport = _transport(blueprint, experts, router, key=key, node=node, device=device)
        self.dispatcher = Dispatcher(
            blueprint.placement,
            self._transport,
            wait_s=experts.wait_s,
            timeout_s=experts.timeout_s,
            hedge_after=experts.hedge_after,
            on_lost=on_lost,
        )
        # What `scatter` allows a row at most: silence, then `wait_s` of tries, and the silence of the last one.
        vitals = Vitals(experts_s=experts.wait_s + 2 * experts.timeout_s + COMPUTE_S)
        routing = None
        if experts.transport == "local":
            self.dispatcher.update(_everything_here(experts, blueprint))
        else:
            routing = RoutingRecord(self.dispatcher, experts.groups)
        self.backbone = load_backbone(
            Path(blueprint.model_path),
            plan,
            dtype=getattr(torch, plan.dtype),
            device=torch.device(device),
            moe=vitals.watched(self.dispatcher.scatter_gather),
            kv_tokens=router.kv_tokens,
            page_tokens=PAGE_TOKENS,
            batch_invariant=router.batch_invariant,
        )
        self.engine = Engine(
            self.backbone,
            max_batch_tokens=router.max_batch_tokens,
            max_sequences=router.max_sequences,
            max_queued_requests=router.max_queued_requests,
            max_wait_share=router.max_wait_share,
            routing=routing,
            experts=ExpertRecord(self.dispatcher),
            tracing=None if tracer is None else StepSpans(tracer, self.dispatcher),
            vitals=vitals,
            wanted_until=self._wanted_until,
        )

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the model's weights without experts, whatever the transport."""
        return self.backbone.parameter_bytes

    def _wanted_until(self, time_s: float) -> None:
        self.dispatcher.until_s = time_s

    def start(self) -> None:
        """Start the engine's thread."""
        self.engine.start()

    def stop(self) -> None:
        """Stop the engine and close all connections; requests still alive fail with a retryable error."""
        self.engine.stop()
        self._transport.close()


def _transport(
    blueprint: Blueprint, experts: ExpertsSpec, router: RouterSpec, *, key: bytes, node: str, device: str
) -> Transport:
    if experts.transport == "local":
        return LocalTransport(_local_groups(blueprint, experts, router, device))
    stream = StreamTransport(key=key, digest=blueprint.digest, node_id=node)
    if experts.transport == "stream":
        return stream
    from cluster.fabric.ray_references import RayReferences  # the one transport that needs Ray

    store = ObjectStoreTransport(stream, RayReferences())
    return store if experts.transport == "object_store" else AutoTransport(stream, store, experts.auto_threshold_bytes)


def _local_groups(blueprint: Blueprint, experts: ExpertsSpec, router: RouterSpec, device: str) -> dict[str, Compute]:
    plan = blueprint.plan
    groups: dict[str, Compute] = {}
    for name, chosen in zip(experts.group_names, blueprint.placement.groups, strict=True):
        weights = load_group(
            plan,
            Path(blueprint.model_path),
            chosen,
            dtype=getattr(torch, plan.dtype),
            device=torch.device(device),
            progress=ProgressBar(f"{name}: loading experts"),
        )

        groups[name] = partial(_compute, weights, router.batch_invariant)
    return groups


def _compute(
    held: GroupWeights, batch_invariant: bool, layer: int, counts: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    return expert_ffn(held.layers[layer], rows, counts, batch_invariant=batch_invariant)


def _everything_here(experts: ExpertsSpec, blueprint: Blueprint) -> View:
    """The view of a router that holds every group itself."""
    here = Address(node="", unix_path="", host="", port=0)
    digest = blueprint.digest.hex()
    replicas = tuple(
        Replica(f"local-{name}", name, "default", here, digest, speed_rows_per_s=1.0, state=State.READY)
        for name in experts.group_names
    )
    return View(Epoch("local", 0), replicas)
