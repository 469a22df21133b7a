"""The safetensors files of a checkpoint: their headers, their integrity, samples of their contents.

Reads headers only (8 bytes of length, JSON, then raw tensors; https://github.com/huggingface/safetensors), so it is
fast for any size. Knows no model and no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, UnsupportedModelError
from cluster.load_plan import LoadPlan, ShardFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SAMPLE_BYTES = 4096
SAMPLES_PER_FILE = 64

_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself accepts
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"F64": 64, "I64": 64, "U64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: index into `Shards.files`, safetensors dtype name, shape."""

    file: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """All files of a checkpoint and all tensors in them."""

    files: tuple[ShardFile, ...]
    tensors: dict[str, TensorInfo]


def read_shards(root: Path) -> Shards:
    """Read and check every header of the checkpoint in `root`.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or the index does not fit the files.
        UnsupportedModelError: there are weights, but not as safetensors.
    """
    index: dict[str, str] | None = None
    if (root / SINGLE).is_file():
        names = [SINGLE]
    elif (root / INDEX).is_file():
        index = _read_index(root / INDEX)
        names = sorted(set(index.values()))
    else:
        raise _no_weights(root)
    files: list[ShardFile] = []
    tensors: dict[str, TensorInfo] = {}
    for number, name in enumerate(names):
        path = root / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {root} lacks the shard {name}, which {INDEX} names.")
        header = _read_header(path)
        files.append(ShardFile(name, path.stat().st_size))
        for key, entry in header.items():
            if index is None or index.get(key) == name:
                tensors[key] = TensorInfo(number, entry["dtype"], tuple(entry["shape"]))
    for key, name in (index or {}).items():
        if key not in tensors:
            raise CheckpointError(f"the shard {root / name} lacks the tensor {key}, which {INDEX} places there.")
    return Shards(tuple(files), tensors)


def content_samples(root: Path, files: Sequence[ShardFile]) -> Iterator[bytes]:
    """Bytes that tell one checkpoint from another of the same shapes: per file its name, size, header, and up to
    64 blocks of 4 KiB spread evenly over its tensors.

    A change confined to bytes between the samples of a large file goes unseen; files up to 256 KiB are covered whole.
    Cost: at most 64 small reads a file, about 40 MB for a checkpoint of 160 shards.
    """
    for file in files:
        yield f"{file.name} {file.size_bytes}\n".encode()
        try:
            with (root / file.name).open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                yield stream.read(start)
                for offset in _sample_offsets(start, file.size_bytes):
                    stream.seek(offset)
                    yield stream.read(SAMPLE_BYTES)
        except OSError as error:
            raise CheckpointError(f"the shard {root / file.name} cannot be read: {error.strerror}.") from None


def content_digest(root: Path, file: ShardFile) -> str:
    """Hex SHA-256 over the samples of one file; the same for equal copies on different nodes."""
    digest = hashlib.sha256()
    for block in content_samples(root, [file]):
        digest.update(block)
    return digest.hexdigest()


def config_digest(root: Path) -> str:
    """Hex SHA-256 of the checkpoint's config.json."""
    path = root / CONFIG
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"the file {path} cannot be read: {error.strerror}.") from None


def check_files(plan: LoadPlan, root: Path) -> None:
    """Refuse a checkpoint that is not the one `plan`, and so the model's digest, was made from.

    Compares sizes, headers, samples and config.json, not times, which differ between the copies of two nodes. Does not
    see what `content_samples` does not see, nor a file that is overwritten after this check, while it is being read.

    Raises:
        CheckpointError: one sentence names the first file that differs.
    """
    for file in plan.files:
        path = root / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"the shard {path} {found}; the load plan expects {file.size_bytes} bytes: "
                "put the old file back, or deploy again to serve the new one."
            )
        if content_digest(root, file) != file.content:
            raise _replaced(path)
    if config_digest(root) != plan.config:
        raise _replaced(root / CONFIG)


def _replaced(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the file {path} is not the one this deployment was made from: its contents differ; "
        "put the old file back, or deploy again to serve the new one."
    )


def _sample_offsets(start: int, size: int) -> list[int]:
    """Offsets of the sample blocks in [start, size): all of it where that is little, else evenly spaced, ends included.

    start 0, size 1 MiB: 64 blocks, (1 MiB - 4 KiB) / 63 = 16,579 bytes apart.
    """
    if size - start <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return list(range(start, size, SAMPLE_BYTES))
    span = size - start - SAMPLE_BYTES
    return [start + span * number // (SAMPLES_PER_FILE - 1) for number in range(SAMPLES_PER_FILE)]


def _no_weights(root: Path) -> CheckpointError:
    if any(root.glob("*.bin")) or any(root.glob("*.pt")) or any(root.glob("*.pth")):
        return UnsupportedModelError(
            f"the checkpoint {root} holds pickled weights only (.bin, .pt); only safetensors files are read, "
            "because unpickling can run code: convert it with save_pretrained."
        )
    return CheckpointError(f"the checkpoint {root} holds neither {SINGLE} nor {INDEX}.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except OSError as error:
        raise CheckpointError(f"the index {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"the index {path} must be JSON with a `weight_map` of tensor names to files.") from None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_plain_name, weight_map.values())):
        raise CheckpointError(
            f"the index {path} must map tensor names to names of .safetensors files in the same folder."
        )
    return weight_map


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of one safetensors file, without metadata, checked against the file's length."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"the shard {path} is damaged or truncated: its header does not fit the file.")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"the shard {path} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((_checked_end(entry) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"the shard {path} is damaged: its header is not that of a safetensors file.") from None
    expected = 8 + length + end
    if expected != size:
        raise CheckpointError(
            f"the shard {path} is truncated or damaged: it has {size} bytes, but its header asks for {expected}."
        )
    checked: dict[str, dict[str, Any]] = header
    return checked


def _checked_end(entry: dict[str, Any]) -> int:
    """End offset of a tensor, after checking that shape, dtype and offsets agree."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(entry)
    bits = _BITS.get(entry["dtype"])
    if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(entry)
    return int(end)
