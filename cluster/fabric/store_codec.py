"""What travels in the frames of the object-store transport, and the replica's side of it.

A tensor in the store is described by its dtype, shape and name; a request adds the token of each of its rows. Both
sides copy what they read into memory of their own: the store's is read-only and not aligned as torch's. Everything
read is checked first, as it comes from another process. Knows no connections and no Ray: `References` is handed in.
Dimension letters: T tokens, H hidden, R rows, E experts of the group in that layer.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import FrameError
from cluster.fabric.words import Words, as_words, word_type

READ_TIMEOUT_S = 5.0
_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ARRAY = struct.Struct("<BHII")
"""dtype, bytes of the name, rows of the array, H; the name follows."""
_TOKEN = np.dtype("<u4")


class References(Protocol):
    """A store of arrays that other processes read by name; `ray_references.RayReferences`, or a double."""

    def put(self, array: npt.NDArray[Any]) -> tuple[object, bytes]:
        """(what to hold on to, its name)."""

    def get(self, name: bytes, timeout_s: float) -> AbstractContextManager[npt.NDArray[Any]]:
        """The array, read-only, for the time of the context."""


class StoreCodec:
    """The replica's side: a `transport.ReferenceCodec`."""

    def __init__(self, references: References) -> None:
        self._references = references

    def load(self, payload: bytes, counts: Tensor) -> Tensor:
        """The rows [R, H], copied. See `transport.ReferenceCodec.load`.

        Raises:
            FrameError: the payload does not fit `counts` or the object.
            ReplicaLostError: the object is lost.
        """
        rows = int(counts.sum())
        array = _Array.parse(payload)
        if rows < 1 or len(payload) != array.end + _TOKEN.itemsize * rows:
            raise FrameError(f"a reference of {len(payload)} bytes for {rows} rows.")
        index = np.frombuffer(payload, dtype=_TOKEN, offset=array.end)
        if int(index.max()) >= array.rows:
            raise FrameError(f"a reference to token {index.max()} of {array.rows}.")
        with self._references.get(array.name, READ_TIMEOUT_S) as words:
            array.check(words)
            loaded = torch.empty((rows, array.hidden), dtype=array.dtype)
            # The indices were checked; "clip" only keeps numpy from buffering the output to check them again.
            words.take(index, axis=0, out=as_words(loaded), mode="clip")
        return loaded

    def store(self, rows: Tensor) -> tuple[object, bytes]:
        """See `transport.ReferenceCodec.store`."""
        return publish(self._references, rows)

    def release(self, token: object) -> None:
        """Nothing to do: the object goes with the last reference to `token`, which the server drops."""


def publish(references: References, tensor: Tensor) -> tuple[object, bytes]:
    """Put a CPU tensor [rows, H]: (what to hold on to, its description: dtype, shape and name)."""
    holding, name = references.put(as_words(tensor.contiguous()))
    return holding, _ARRAY.pack(_CODES[tensor.dtype], len(name), *tensor.shape) + name


def request(description: bytes, index: npt.NDArray[np.int64]) -> bytes:
    """The payload that asks for the rows `index`, int64 [R], of the tensor described."""
    return description + index.astype(_TOKEN).tobytes()


def read(references: References, description: bytes, rows: int) -> Tensor:
    """A copy of the tensor [rows, H] that `publish` described.

    Raises:
        FrameError: the description is none, or does not fit `rows` or the object.
        ReplicaLostError: the object is lost.
    """
    array = _Array.parse(description)
    if array.end != len(description) or array.rows != rows:
        raise FrameError(f"a result of {array.rows} rows for {rows}.")
    with references.get(array.name, READ_TIMEOUT_S) as words:
        array.check(words)
        tensor = torch.empty((rows, array.hidden), dtype=array.dtype)
        np.copyto(as_words(tensor), words)
    return tensor


@dataclass(frozen=True, slots=True)
class _Array:
    """A parsed description. end: where it ends in the payload it was read from."""

    dtype: torch.dtype
    rows: int
    hidden: int
    name: bytes
    end: int

    @classmethod
    def parse(cls, payload: bytes) -> _Array:
        if len(payload) < _ARRAY.size:
            raise FrameError("a reference that is cut short.")
        code, name_bytes, rows, hidden = _ARRAY.unpack_from(payload)
        end = _ARRAY.size + name_bytes
        if code not in _DTYPES or len(payload) < end:
            raise FrameError("a reference that is cut short or of unknown dtype.")
        return cls(_DTYPES[code], rows, hidden, payload[_ARRAY.size : end], end)

    def check(self, words: Words) -> None:
        """Whether the object is what it was said to be."""
        if words.shape != (self.rows, self.hidden) or words.dtype != word_type(self.dtype):
            raise FrameError(f"an object of {words.shape} {words.dtype} for {self.rows} x {self.hidden} {self.dtype}.")
