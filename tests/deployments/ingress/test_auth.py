"""API keys from files (well under 1 s)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import AuthenticationError, ConfigError
from deployments.ingress.auth import Authenticator, KeyFile


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# operators\n\n  first  \nsecond\n")
    return path


def test_without_key_files_everyone_passes() -> None:
    auth = Authenticator()
    auth.check_api(None)
    auth.check_admin(None)


def test_every_line_but_comments_and_blanks_is_a_key(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    auth.check_api("Bearer first")
    auth.check_api("bearer second")
    for header in (None, "", "first", "Basic first", "Bearer", "Bearer ", "Bearer third", "Bearer # operators"):
        with pytest.raises(AuthenticationError):
            auth.check_api(header)


def test_a_key_that_is_no_ascii_is_wrong_and_not_an_error(keys: Path) -> None:
    with pytest.raises(AuthenticationError):
        Authenticator(KeyFile(keys)).check_api("Bearer sch\u00fcssel\udcff")


def test_a_changed_file_counts_from_the_next_request(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    keys.write_text("third\n")
    os.utime(keys, ns=(1, 1))
    auth.check_api("Bearer third")
    with pytest.raises(AuthenticationError):
        auth.check_api("Bearer first")


def test_when_the_file_disappears_the_last_keys_stay(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    keys.unlink()
    auth.check_api("Bearer first")
    with pytest.raises(AuthenticationError):
        auth.check_api("Bearer third")


def test_an_empty_file_lets_nobody_in(keys: Path) -> None:
    keys.write_text("")
    with pytest.raises(AuthenticationError):
        Authenticator(KeyFile(keys)).check_api("Bearer first")


def test_a_missing_file_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        KeyFile(tmp_path / "none")


def test_admin_keys_open_both_and_api_keys_only_the_model(keys: Path, tmp_path: Path) -> None:
    admin = tmp_path / "admin"
    admin.write_text("root\n")
    auth = Authenticator(KeyFile(keys), KeyFile(admin))
    auth.check_api("Bearer root")
    auth.check_admin("Bearer root")
    auth.check_api("Bearer first")
    with pytest.raises(AuthenticationError):
        auth.check_admin("Bearer first")


def test_without_admin_keys_api_keys_guard_the_cluster_view(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    auth.check_admin("Bearer first")
    with pytest.raises(AuthenticationError):
        auth.check_admin(None)
