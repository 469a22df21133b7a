"""API keys: which bearer tokens may generate, and which may see the cluster.

Key files hold one key a line; blank lines and lines that start with # are skipped. A changed file counts from the next
request on. Knows no HTTP beyond the `Authorization` header's text.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from cluster.errors import AuthenticationError, ConfigError

log = logging.getLogger(__name__)

_Version = tuple[int, int, int, int]


class KeyFile:
    """The keys in one file, read again whenever the file changes.

    Raises:
        ConfigError: the file cannot be read at the start. Later the last keys stay in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: _Version | None = None
        self._digests: tuple[bytes, ...] = ()
        try:
            self._reload()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The key file {path} cannot be read: {error}.") from None

    def holds(self, key: str) -> bool:
        """Is `key` one of the keys? Takes the same time whichever it is, or none."""
        try:
            self._reload()
        except (OSError, UnicodeDecodeError) as error:
            log.warning("key file %s cannot be read (%s); the keys read before stay in force", self._path, error)
        asked = _digest(key)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(asked, digest)
        return found

    def _reload(self) -> None:
        stat = self._path.stat()
        version = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)
        if version == self._version:
            return
        lines = (line.strip() for line in self._path.read_text(encoding="utf-8").splitlines())
        self._digests = tuple(_digest(line) for line in lines if line and not line.startswith("#"))
        self._version = version


class Authenticator:
    """Decides by the `Authorization` header. Without key files every request passes.

    Admin keys open everything that API keys open, and the cluster view.
    """

    def __init__(self, api_keys: KeyFile | None = None, admin_keys: KeyFile | None = None) -> None:
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    def check_api(self, authorization: str | None) -> None:
        """Raises AuthenticationError unless the request may use the model."""
        if self._api_keys is not None:
            files = (self._api_keys, self._admin_keys) if self._admin_keys else (self._api_keys,)
            _check(authorization, files, "an API key")

    def check_admin(self, authorization: str | None) -> None:
        """Raises AuthenticationError unless the request may see the cluster."""
        if self._admin_keys is None:
            self.check_api(authorization)
        else:
            _check(authorization, (self._admin_keys,), "an admin key")


def _check(authorization: str | None, files: tuple[KeyFile, ...], wanted: str) -> None:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError(f"Send {wanted} in the header 'Authorization: Bearer KEY'.", code="missing_api_key")
    # A list: every file is asked, whichever one matches, so the time taken tells nothing.
    if True not in [file.holds(key.strip()) for file in files]:
        raise AuthenticationError(f"The key sent is not {wanted} of this server.", code="invalid_api_key")


def _digest(key: str) -> bytes:
    """Digests have one length, so that a comparison tells nothing about the length of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
