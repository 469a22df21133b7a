"""The way of a layer's tensors between a device and the memory that the fabric reads and writes.

On the CPU there is none: tensors are handed through. On a GPU they go through pinned memory on a stream of their own,
so that a copy neither stops the host in the driver nor waits for work that comes after it:

    compute stream   gate ──┐                        ┌── combine
    copy stream             └ hidden, index → pinned ┘ results → device
    host                        waits for this copy alone, then scatters and gathers

Pinned memory comes from torch's caching allocator, so asking for it for every layer costs little after the first.
Works with any device module that has streams (torch.cuda, torch.xpu); devices without are copied from and to the plain
way, waiting. Its order of operations is tested with a module
that writes down what is asked of it; none of it has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.fabric.packing import plain_bytes


class Staging(Protocol):
    """Both ways. Belongs to one thread."""

    def leave(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the CPU, complete; the caller's own where they were there already."""

    def arrive(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device, usable by what is queued on its current stream from now on."""

    def memory(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] on the CPU, from which `arrive` copies fastest."""


class NoStaging:
    """The device is the CPU."""

    def leave(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors themselves; copies of those that are elsewhere nevertheless."""
        return [tensor if tensor.is_cpu else tensor.cpu() for tensor in tensors]

    def arrive(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def memory(self, size_bytes: int) -> Tensor:
        """Plain memory."""
        return plain_bytes(size_bytes)


class PlainStaging:
    """The device has no streams: every copy is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def leave(self, *tensors: Tensor) -> list[Tensor]:
        """Wait for the tensors and copy those that are not on the CPU."""
        return [tensor.cpu() for tensor in tensors]

    def arrive(self, tensor: Tensor) -> Tensor:
        """Copy and wait."""
        return tensor.to(self._device)

    def memory(self, size_bytes: int) -> Tensor:
        """Plain memory."""
        return plain_bytes(size_bytes)


class PinnedStaging:
    """The device has streams.

    module: torch.cuda or alike. pin: whether host memory is pinned; only tests without such a device say no.
    """

    def __init__(self, device: torch.device, module: Any, *, pin: bool = True) -> None:
        self._device = device
        self._module = module
        self._pin = pin
        self._copies = module.Stream(device)

    def leave(self, *tensors: Tensor) -> list[Tensor]:
        """Wait for what computes the tensors and for their copies, for nothing else. Those of the CPU stay."""
        self._copies.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._copies):
            hosts = [
                tensor if tensor.is_cpu else self._host_like(tensor).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
        for tensor in tensors:
            if not tensor.is_cpu:
                tensor.record_stream(self._copies)  # its memory may not be given to others before it was copied
        self._copies.synchronize()
        return hosts

    def arrive(self, tensor: Tensor) -> Tensor:
        """Copy without waiting; the current stream waits for the copy."""
        # The source may be overwritten as soon as the next `leave` returns: that waits for all earlier copies.
        source = tensor if tensor.is_pinned() or not self._pin else self._host_like(tensor).copy_(tensor)
        current = self._module.current_stream(self._device)
        with self._module.stream(self._copies):
            arrived = source.to(self._device, non_blocking=True)
        current.wait_stream(self._copies)
        arrived.record_stream(current)
        return arrived

    def memory(self, size_bytes: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._pin)

    def _host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)


def staging_for(device: torch.device) -> Staging:
    """The staging between `device` and the CPU."""
    if device.type == "cpu":
        return NoStaging()
    module = getattr(torch, device.type, None)
    return PinnedStaging(device, module) if hasattr(module, "Stream") else PlainStaging(device)
