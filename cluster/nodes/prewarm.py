"""Machines before a peak: how many replicas need, and the change of `minReplicas` that asks Ray for them. Pure.

    seats ──> machines per worker group (cheapest first, up to maxReplicas) ──> JSON patch of the child RayCluster

What was found is remembered in an annotation of the RayCluster itself, beside what it was set to, so that it can be let
go whoever comes next: {"l4": {"found": 1, "set": 3}}. A value that is neither was written by somebody else meanwhile:
it is what is found then.

    minReplicas    1 ──── raised, found 1 ────> 3 ──── wanted no more ────> 1
                                                └── somebody writes 2 ────> 2 is what is found: stays 2, or is raised
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

from cluster.nodes.inventory import WorkerGroup, worker_groups
from cluster.nodes.offers import ROUNDING, matches

ANNOTATION = "expertscale.io/prewarm"


@dataclass(frozen=True)
class Seat:
    """Replicas alike that are to run at the peak. peak: more than there usually are, so that machines must come."""

    name: str
    replicas: int
    gpus: float
    cpus: float
    selector: Mapping[str, str] = field(default_factory=dict)
    peak: bool = True


@dataclass(frozen=True)
class Raised:
    """`minReplicas` of a worker group: as it was found, and as it was set."""

    found: int
    set: int


@dataclass(frozen=True)
class Plan:
    """patch: JSON patch operations, none where nothing is to be changed. raised: what is raised once it has been made.

    notes: what could not be had, a sentence each.
    """

    patch: tuple[Mapping[str, Any], ...]
    raised: Mapping[str, Raised]
    notes: tuple[str, ...] = ()


def machines(
    seats: Iterable[Seat], groups: Iterable[WorkerGroup], patterns: Sequence[str] = ("*",)
) -> tuple[dict[str, int], tuple[str, ...]]:
    """(worker group -> machines it must have for the peak, sentences on what finds no place).

    Only groups in which a seat of the peak takes place are named. patterns: names of those that may be raised.
    """
    # The dearest last; those whose price nobody knows after all others, in their own order.
    listed = sorted(groups, key=lambda group: (group.price_per_hour is None, group.price_per_hour or 0.0))
    used = {group.name: 0.0 for group in listed}
    peaks: set[str] = set()
    notes = []
    # What is there already takes its place first, and what needs most of a machine before what needs little.
    for seat in sorted(seats, key=lambda seat: (seat.peak, -seat.gpus, -seat.cpus)):
        left = seat.replicas
        for group in listed:
            fit = group.offer.fit(seat.gpus, seat.cpus) if matches(seat.selector, group.labels) else 0
            taken = min(left, int((group.most - used[group.name]) * fit + ROUNDING)) if fit else 0
            if taken:
                used[group.name] += taken / fit
                left -= taken
                if seat.peak:
                    peaks.add(group.name)
        if left and seat.peak:
            notes.append(f"prewarm: {left} of {seat.replicas} replicas of {seat.name} find no room in any worker group")
    raisable = {
        group.name
        for group in listed
        if group.index is not None and any(fnmatchcase(group.name, pattern) for pattern in patterns)
    }
    return {name: ceil(used[name] - ROUNDING) for name in peaks & raisable}, tuple(sorted(notes))


def plan(raycluster: Mapping[str, Any], wanted: Mapping[str, int], may_release: bool) -> Plan:
    """What to change so that worker groups have the machines `wanted`, and others what was found.

    may_release: False while it is not known what is wanted: then nothing is lowered. Nothing exceeds `maxReplicas`.
    """
    record, notes = _record(raycluster)
    raised: dict[str, Raised] = {}
    patch: list[Mapping[str, Any]] = []
    for group in worker_groups(raycluster):
        if group.index is None:
            continue
        before = record.get(group.name)
        found = before.found if before is not None and before.set == group.minimum else group.minimum
        want = wanted.get(group.name, 0)
        if want > group.maximum:
            notes.append(f"prewarm: {group.name} should have {want} machines, and its maxReplicas is {group.maximum}")
        target = max(found, min(want, group.maximum))
        if not may_release:
            target = max(target, group.minimum)
        if target != found:
            raised[group.name] = Raised(found, target)
        if target != group.minimum:
            path = f"/spec/workerGroupSpecs/{group.index}/minReplicas"
            patch.append({"op": "add", "path": path, "value": target})
    if raised != record:
        patch += _write(raycluster, raised)
    if patch:
        # Makes a change that was planned for another state of the object a conflict.
        version = (raycluster.get("metadata") or {}).get("resourceVersion")
        patch.insert(0, {"op": "replace", "path": "/metadata/resourceVersion", "value": version})
    return Plan(tuple(patch), raised, tuple(notes))


def _record(raycluster: Mapping[str, Any]) -> tuple[dict[str, Raised], list[str]]:
    text = ((raycluster.get("metadata") or {}).get("annotations") or {}).get(ANNOTATION)
    if text is None:
        return {}, []
    try:
        record = {str(name): Raised(int(each["found"]), int(each["set"])) for name, each in json.loads(text).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}, [f"prewarm: the annotation {ANNOTATION} of the RayCluster is not as it was written; begun anew"]
    return record, []


def _write(raycluster: Mapping[str, Any], raised: Mapping[str, Raised]) -> list[Mapping[str, Any]]:
    annotations = (raycluster.get("metadata") or {}).get("annotations")
    path = "/metadata/annotations/" + ANNOTATION.replace("~", "~0").replace("/", "~1")
    if not raised:
        return [{"op": "remove", "path": path}]
    value = json.dumps({name: {"found": each.found, "set": each.set} for name, each in sorted(raised.items())})
    if annotations is None:
        return [{"op": "add", "path": "/metadata/annotations", "value": {ANNOTATION: value}}]
    return [{"op": "add", "path": path, "value": value}]
