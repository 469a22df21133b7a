"""Tensors between a device and the CPU: a GPU where there is one, else a module that notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cluster.fabric.staging import NoStaging, PinnedStaging, PlainStaging, Staging, staging_for

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_leaves_and_arrives_is_the_same_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    staging = staging_for(torch.device(device))
    tensors = [torch.arange(12, device=device).view(3, 4).to(dtype), torch.tensor([5], device=device)]
    left = staging.leave(*tensors)
    assert [tensor.device.type for tensor in left] == ["cpu", "cpu"]
    for before, after in zip(tensors, left, strict=True):
        arrived = staging.arrive(after)
        assert arrived.device == before.device
        assert torch.equal(arrived, before)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_plain_bytes_of_the_host(device: str) -> None:
    memory = staging_for(torch.device(device)).memory(100)
    assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (100,), "cpu")


def test_on_the_cpu_nothing_is_copied() -> None:
    staging = staging_for(torch.device("cpu"))
    assert isinstance(staging, NoStaging)
    tensor = torch.ones(2)
    assert staging.leave(tensor)[0] is tensor
    assert staging.arrive(tensor) is tensor


class Elsewhere(Tensor):
    """A tensor that says it is not on the CPU."""

    is_cpu = False  # type: ignore[assignment]


def elsewhere() -> Tensor:
    return torch.randn(3, 2).as_subclass(Elsewhere)


def test_a_device_without_streams_copies_the_plain_way() -> None:
    staging = staging_for(torch.device("meta"))
    assert isinstance(staging, PlainStaging)
    tensor = torch.ones(2)
    assert staging.leave(tensor)[0] is tensor
    assert staging.arrive(tensor).device.type == "meta"
    assert staging.memory(5).shape == (5,)


def test_a_device_whose_module_has_no_streams_copies_the_plain_way() -> None:
    assert not hasattr(torch.mps, "Stream")
    assert isinstance(staging_for(torch.device("mps")), PlainStaging)


class Stream:
    """A stream that writes down what happens on it, and between it and others."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.notes.append(f"host waits for {self.name}")


class Module:
    """Stands for torch.cuda."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.current = Stream("compute", self.notes)

    def Stream(self, device: torch.device) -> Stream:  # noqa: ARG002 - torch's names
        return Stream("copies", self.notes)

    def current_stream(self, device: torch.device) -> Stream:  # noqa: ARG002
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.notes.append(f"on {stream.name}")
        yield
        self.current = before


def noted(module: Module) -> tuple[Staging, patch]:  # type: ignore[valid-type]
    """Staging over `module`, and a patch that notes whose memory is kept for which stream."""

    def record_stream(_: Tensor, stream: Stream) -> None:
        module.notes.append(f"memory kept for {stream.name}")

    return PinnedStaging(torch.device("cpu"), module, pin=False), patch.object(Tensor, "record_stream", record_stream)


def test_what_leaves_is_copied_beside_the_computation_and_the_host_waits_for_the_copy_alone() -> None:
    module = Module()
    staging, noting = noted(module)
    tensor = elsewhere()
    with noting:
        (left,) = staging.leave(tensor)
    assert torch.equal(left, tensor)
    assert left.data_ptr() != tensor.data_ptr()
    assert module.notes == [
        "copies waits for compute",
        "on copies",
        "memory kept for copies",
        "host waits for copies",
    ]


def test_what_is_on_the_cpu_already_is_handed_through_beside_what_is_copied() -> None:
    module = Module()
    staging, noting = noted(module)
    away, here = elsewhere(), torch.tensor([5])
    with noting:
        copied, same = staging.leave(away, here)
    assert torch.equal(copied, away)
    assert copied is not away
    assert same is here
    assert module.notes.count("memory kept for copies") == 1


def test_what_arrives_is_waited_for_by_the_computation_and_not_by_the_host() -> None:
    module = Module()
    staging, noting = noted(module)
    tensor = torch.randn(3, 2)
    with noting:
        assert torch.equal(staging.arrive(tensor), tensor)
    assert module.notes == ["on copies", "compute waits for copies", "memory kept for compute"]
