"""Objects of Ray's store by hand: put an array, name it in bytes that can travel any way, get it in another process.

The only file of the project that uses Ray's private interface; written against the pinned ray 2.60.0 and checked by the
tests of `object_store` (results, both leak directions, lost objects, mutated names). Why private: a pickled
`ObjectRef` would be pinned for the life of the process, and its id alone cannot be resolved by others.

A name is the id of the object and the address of its owner. The owner keeps the object for as long as it holds what
`put` returned; readers by hand are not counted, so it must hold it until they have read. Reading what the owner has
released, or what died with it, fails within milliseconds to about two seconds, never later than the timeout.
`ray.put` always writes to the shared-memory store, small objects included. Knows no tensors and no frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.core.generated import common_pb2

from cluster.errors import FabricError, FrameError, ReplicaLostError

Array = npt.NDArray[Any]
_ID_BYTES = 28
_MAX_PORT = (1 << 16) - 1


class RayReferences:
    """Puts and gets in the process's own Ray worker; usable from any of its threads."""

    def put(self, array: Array) -> tuple[object, bytes]:
        """Copy `array` to the store: (what to hold on to, its name).

        Raises:
            FabricError: the store does not take it.
        """
        try:
            reference = ray.put(array)
            owner = ray._private.worker.global_worker.core_worker.get_owner_address(reference)
        except ray.exceptions.RayError as error:
            raise FabricError(f"the object store took no {array.nbytes} bytes: {_sentence(error)}") from None
        return reference, reference.binary() + owner

    @contextmanager
    def get(self, name: bytes, timeout_s: float) -> Iterator[Array]:
        """The array called `name`, read-only and not to be used afterwards.

        Raises:
            FrameError: these bytes are no name, or it is not an array's.
            ReplicaLostError: the object cannot be had: released, lost with its owner, or not within `timeout_s`.
        """
        object_id, owner = parse(name)
        worker = ray._private.worker.global_worker
        reference = ray.ObjectRef(object_id, owner)
        worker.core_worker.deserialize_and_register_object_ref(object_id, ray.ObjectRef.nil(), owner, b"")
        try:
            # Not ray.get: inside an asynchronous actor it warns of a blocked loop, and this is a thread beside it.
            values, _ = worker.get_objects([reference], timeout_s)
        except ray.exceptions.RayError as error:
            raise ReplicaLostError(f"an object of the store is lost: {_sentence(error)}") from None
        if not isinstance(values[0], np.ndarray):
            raise FrameError("the object named is no array.")
        yield values[0]


def parse(name: bytes) -> tuple[bytes, bytes]:
    """(object id, owner address) of a name. Every field is checked: Ray aborts the process over a malformed one.

    Raises:
        FrameError: these bytes are no name.
    """
    object_id, owner = name[:_ID_BYTES], name[_ID_BYTES:]
    try:
        address = common_pb2.Address.FromString(owner)
    except Exception:
        raise FrameError("the owner of an object is no address.") from None
    whole = len(address.node_id) == len(address.worker_id) == len(object_id) == _ID_BYTES and address.ip_address
    if not whole or not 0 < address.port <= _MAX_PORT or address.SerializeToString() != owner:
        raise FrameError("the owner of an object is no address.")
    return object_id, owner


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
