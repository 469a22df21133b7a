"""The cluster key: made once, kept, readable by its owner only."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.keys import make_key_file, read_key_file


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "cluster.key"
    make_key_file(path)
    first = read_key_file(path)
    make_key_file(path)
    assert read_key_file(path) == first
    assert len(first) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_files_get_different_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_key_file(tmp_path / name)
    assert read_key_file(tmp_path / "a") != read_key_file(tmp_path / "b")


def test_a_missing_or_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "none")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ConfigError, match="6 characters; at least 16"):
        read_key_file(tmp_path / "short")


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match=r"security\.cluster_key_file: .*raw is no text"):
        read_key_file(tmp_path / "raw")


def test_a_key_that_cannot_be_written_is_an_error_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"security\.cluster_key_file: .* cannot be written"):
        make_key_file(tmp_path / "file" / "cluster.key")
