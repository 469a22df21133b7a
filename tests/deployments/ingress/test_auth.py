"""API keys from files and variables (well under 1 s)."""

from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path

import pytest

from cluster.config import SecuritySpec
from cluster.errors import AuthenticationError, ConfigError
from deployments.ingress import auth as auth_module
from deployments.ingress.auth import Authenticator, KeyFile, authenticator
from deployments.ingress.keys import KeyLimits, KeyRecord, digest_of


def line(key: str, limits: KeyLimits = KeyLimits()) -> str:  # noqa: B008 - frozen
    return KeyRecord(f"of-{key}", digest_of(key), limits).line() + "\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# operators\n\n" + line("first", KeyLimits(streams=2)) + line("second"))
    return path


def refused(auth: Authenticator, header: str | None) -> bool:
    try:
        auth.check_api(header)
    except AuthenticationError:
        return True
    return False


def test_without_keys_everyone_passes() -> None:
    auth = authenticator(SecuritySpec(), {})
    assert auth.check_api(None) is None
    auth.check_admin(None)


def test_a_key_is_known_by_its_hash_and_comes_with_its_limits(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    assert auth.check_api("Bearer first") == KeyRecord("of-first", digest_of("first"), KeyLimits(streams=2))
    assert auth.check_api("bearer second") == KeyRecord("of-second", digest_of("second"))


def test_anything_else_is_no_key(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    stored = digest_of("first").hex()
    for header in (None, "", "first", "Basic first", "Bearer", "Bearer ", "Bearer third", "Bearer # operators"):
        assert refused(auth, header)
    for text in (stored, f"sha256:{stored}", "of-first", line("first").strip(), "First", "first second"):
        assert refused(auth, f"Bearer {text}")
    assert refused(auth, "Bearer sch\u00fcssel\udcff")


def test_every_key_is_compared_whichever_matches(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    constant_time = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return constant_time(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    auth = Authenticator(KeyFile(keys))
    counts = set()
    for key in ("first", "second", "third"):
        compared.clear()
        refused(auth, f"Bearer {key}")
        counts.add(len(compared))
    assert counts == {2}


def test_a_changed_file_counts_from_the_next_request(keys: Path) -> None:
    auth = Authenticator(KeyFile(keys))
    keys.write_text(line("third"))
    os.utime(keys, ns=(1, 1))
    assert not refused(auth, "Bearer third")
    assert refused(auth, "Bearer first")


def test_a_broken_edit_keeps_the_old_keys_and_is_logged_once(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    auth = Authenticator(KeyFile(keys))
    keys.write_text(line("third") + "a-plain-key\n")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert not refused(auth, "Bearer first")
            assert refused(auth, "Bearer third")
    assert [record.getMessage() for record in caplog.records] == [
        f"the keys read before stay in force: the key file {keys}, line 2: a line should be `NAME sha256:HEX "
        "[LIMIT=N ...]` and never hold a key itself; for the line of a key, pipe the key into "
        "`python -m deployments.ingress.keys hash NAME`."
    ]
    caplog.clear()
    keys.write_text(line("third"))
    assert not refused(auth, "Bearer third")
    keys.write_text("again wrong\n")
    assert not refused(auth, "Bearer third")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("damage", ["gone", "no text", "too large", "open to all"])
def test_a_file_that_cannot_be_used_any_more_keeps_the_old_keys(
    damage: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = Authenticator(KeyFile(keys))
    if damage == "gone":
        keys.unlink()
    elif damage == "no text":
        keys.write_bytes(b"\xff")
    elif damage == "too large":
        monkeypatch.setattr(auth_module, "MAX_FILE_BYTES", 10)
        keys.write_text(line("third"))
    else:
        keys.chmod(0o666)
    assert not refused(auth, "Bearer first")
    assert refused(auth, "Bearer third")


def test_an_empty_file_lets_nobody_in(keys: Path) -> None:
    keys.write_text("")
    assert refused(Authenticator(KeyFile(keys)), "Bearer first")


@pytest.mark.parametrize("text", [None, "a-plain-key\n"])
def test_a_file_that_cannot_be_used_is_found_at_the_start(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"^security.api_keys_file: {path}"):
        authenticator(SecuritySpec(api_keys_file=str(path)), {})


def test_keys_come_from_a_variable_too() -> None:
    spec = SecuritySpec(api_keys_env="KEYS", admin_keys_env="ADMINS")
    auth = authenticator(spec, {"KEYS": line("first"), "ADMINS": line("root")})
    assert not refused(auth, "Bearer first")
    auth.check_admin("Bearer root")
    with pytest.raises(ConfigError, match=r"security\.admin_keys_env: the variable ADMINS is not set"):
        authenticator(spec, {"KEYS": ""})
    with pytest.raises(ConfigError, match=r"security\.api_keys_env: the variable KEYS, line 1"):
        authenticator(spec, {"KEYS": "a-plain-key", "ADMINS": ""})


def test_admin_keys_open_both_and_api_keys_only_the_model(keys: Path, tmp_path: Path) -> None:
    admin = tmp_path / "admin"
    admin.write_text(line("root"))
    auth = Authenticator(KeyFile(keys), KeyFile(admin))
    assert not refused(auth, "Bearer root")
    auth.check_admin("Bearer root")
    for header in ("Bearer first", None):
        with pytest.raises(AuthenticationError):
            auth.check_admin(header)


def test_with_api_keys_but_no_admin_keys_the_cluster_view_stays_shut(keys: Path) -> None:
    for header in ("Bearer first", None):
        with pytest.raises(AuthenticationError, match="this server has none"):
            Authenticator(KeyFile(keys)).check_admin(header)
