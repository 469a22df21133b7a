"""The cluster key: made once, kept, readable by its owner only."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.config import SecuritySpec
from cluster.errors import ConfigError
from cluster.keys import cluster_key, make_key_file, new_key, provide_key, read_key_file


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
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(ConfigError, match="6 characters; at least 16"):
        read_key_file(tmp_path / "short")


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\xff" * 32)
    (tmp_path / "raw").chmod(0o600)
    with pytest.raises(ConfigError, match=r"security\.cluster_key_file: .*raw is no text"):
        read_key_file(tmp_path / "raw")


def test_a_key_that_cannot_be_written_is_an_error_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"security\.cluster_key_file: .* cannot be written"):
        make_key_file(tmp_path / "file" / "cluster.key")


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [(0o600, True), (0o400, True), (0o440, True), (0o640, True), (0o604, False), (0o602, False), (0o660, False)],
)
def test_a_key_open_to_others_is_refused(mode: int, allowed: bool, tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key_file(path)
    path.chmod(mode)
    if allowed:
        assert read_key_file(path)
    else:
        with pytest.raises(ConfigError, match=f"has mode {mode:04o}, open to others .* `chmod 600 {path}`"):
            read_key_file(path)


def test_the_variable_counts_unless_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(tmp_path))
    named, unnamed = SecuritySpec(cluster_key_file="own.key"), SecuritySpec(cluster_key_env="MY_KEY")
    given = {"MY_KEY": new_key(), "EXPERTSCALE_CLUSTER_KEY": new_key()}
    provide_key(unnamed, given)
    assert list(tmp_path.iterdir()) == []
    assert cluster_key(unnamed, given) == given["MY_KEY"].encode()
    provide_key(named, given)
    assert cluster_key(named, given) == read_key_file(tmp_path / "own.key")


def test_without_file_and_variable_a_key_is_made_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(tmp_path))
    provide_key(SecuritySpec(), {})
    first = cluster_key(SecuritySpec(), {})
    provide_key(SecuritySpec(), {})
    assert cluster_key(SecuritySpec(), {}) == first


def test_a_short_key_in_the_variable_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match=r"security\.cluster_key_env: the variable .* holds 6 ch") as e:
        cluster_key(SecuritySpec(), {"EXPERTSCALE_CLUSTER_KEY": "secret"})
    assert "secret" not in str(e.value)
