"""Safetensors headers, indexes and content samples. About 5 s, 4 of them imports."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, UnsupportedModelError
from cluster.load_plan import ShardFile
from cluster.shards import SAMPLE_BYTES, SAMPLES_PER_FILE, content_samples, read_shards
from tests import models
from tests.checkpoints import one_sentence


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_shards(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {shard.name}"):
        read_shards(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    folder = models.save("mixtral", tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=shard.name) as error:
        read_shards(folder)
    one_sentence(error)


def damage_length(content: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + content[8:]


def damage_json(content: bytes) -> bytes:
    return content[:8] + b"x" + content[9:]


def damage_dtype(content: bytes) -> bytes:
    return content.replace(b'"F32"', b'"F16"', 1)


@pytest.mark.parametrize("damage", [damage_length, damage_json, damage_dtype])
def test_a_damaged_header_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = models.save("mixtral", tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(CheckpointError, match=shard.name) as error:
        read_shards(folder)
    one_sentence(error)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_a_damaged_index_is_named(tmp_path: Path, index: str) -> None:
    folder = models.save("mixtral", tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_shards(folder)


def test_an_index_that_names_tensors_in_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the tensor ghost\.weight"):
        read_shards(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        read_shards(folder)


def test_every_tensor_of_every_shard_is_found(tmp_path: Path) -> None:
    shards = read_shards(models.save("olmoe", tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {key: shards.files[info.file].name for key, info in shards.tensors.items()} == index
    assert [file.size_bytes for file in shards.files] == [(tmp_path / f.name).stat().st_size for f in shards.files]


def shard_of(path: Path, payload: bytes) -> ShardFile:
    path.write_bytes(struct.pack("<Q", 2) + b"{}" + payload)
    return ShardFile(path.name, path.stat().st_size)


@pytest.mark.parametrize("position", [0, 12345, 199_999])
def test_samples_cover_a_small_file_whole(tmp_path: Path, position: int) -> None:
    payload = bytearray(200_000)
    before = b"".join(content_samples(tmp_path, [shard_of(tmp_path / "a", bytes(payload))]))
    payload[position] = 1
    assert before != b"".join(content_samples(tmp_path, [shard_of(tmp_path / "a", bytes(payload))]))


@pytest.mark.parametrize("position", [0, 2_999_999])
def test_samples_of_a_large_file_are_few_and_reach_both_ends(tmp_path: Path, position: int) -> None:
    payload = bytearray(3_000_000)
    before = b"".join(content_samples(tmp_path, [shard_of(tmp_path / "a", bytes(payload))]))
    assert len(before) < SAMPLES_PER_FILE * SAMPLE_BYTES + 100
    payload[position] = 1
    assert before != b"".join(content_samples(tmp_path, [shard_of(tmp_path / "a", bytes(payload))]))
