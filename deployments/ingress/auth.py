"""API keys: which bearer tokens may generate, and which may see the cluster.

Keys come from a file, read again when it changes, or from an environment variable; `keys.py` says what a line is.
Knows no HTTP beyond the `Authorization` header's text.
"""

from __future__ import annotations

import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cluster.config import SecuritySpec, resolve
from cluster.errors import AuthenticationError, ConfigError
from deployments.ingress.keys import KeyRecord, digest_of, parse_keys

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 20

_Version = tuple[int, int, int, int, int]


class Keys:
    """A fixed set of keys, such as an environment variable holds."""

    def __init__(self, records: tuple[KeyRecord, ...]) -> None:
        self._records = records

    def find(self, digest: bytes) -> KeyRecord | None:
        """The record of the key with this digest. Takes the same time whichever it is, or none."""
        found = None
        for record in self._records:
            if hmac.compare_digest(digest, record.digest):
                found = record
        return found


class KeyFile(Keys):
    """The keys in one file, read again whenever the file changes.

    Raises:
        ConfigError: the file cannot be read at the start, or a line is wrong. Later the last valid keys stay in force.
    """

    def __init__(self, path: Path, what: str = "the key file") -> None:
        self._path = path
        self._what = f"{what} {path}"
        self._version: _Version | None = None
        self._refused: str | None = None
        super().__init__(())
        self._reload()

    def find(self, digest: bytes) -> KeyRecord | None:
        """As `Keys.find`, by the file as it is now."""
        try:
            self._reload()
            self._refused = None
        except ConfigError as error:
            if str(error) != self._refused:  # once for each trouble, not for each request
                log.warning("the keys read before stay in force: %s", error)
            self._refused = str(error)
        return super().find(digest)

    def _reload(self) -> None:
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size, status.st_mode)
            if version == self._version:
                if self._refused is not None:
                    raise ConfigError(self._refused)
                return
            text = self._path.read_text(encoding="utf-8") if status.st_size <= MAX_FILE_BYTES else None
        except UnicodeDecodeError:
            raise ConfigError(f"{self._what} is no UTF-8 text.") from None
        except OSError as error:
            raise ConfigError(f"{self._what} cannot be read: {error.strerror}.") from None
        self._version = version
        if text is None:
            raise ConfigError(f"{self._what} has more than {MAX_FILE_BYTES} bytes; allowed: up to {MAX_FILE_BYTES}.")
        if status.st_mode & stat.S_IWOTH:
            raise ConfigError(f"{self._what} can be written by everybody; run `chmod o-w {self._path}`.")
        self._records = parse_keys(text, self._what)


class Authenticator:
    """Decides by the `Authorization` header. Without keys every request passes.

    Admin keys open everything that API keys open, and the cluster view. Where there are API keys but no admin keys the
    cluster view stays shut.
    """

    def __init__(self, api_keys: Keys | None = None, admin_keys: Keys | None = None) -> None:
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    def check_api(self, authorization: str | None) -> KeyRecord | None:
        """The key of a request that may use the model; None where no key is asked for.

        Raises:
            AuthenticationError: it may not.
        """
        if self._api_keys is None:
            return None
        sources = (self._api_keys, self._admin_keys) if self._admin_keys else (self._api_keys,)
        return _record(authorization, sources, "an API key")

    def check_admin(self, authorization: str | None) -> None:
        """Raises AuthenticationError unless the request may see the cluster."""
        if self._admin_keys is not None:
            _record(authorization, (self._admin_keys,), "an admin key")
        elif self._api_keys is not None:
            message = "This page needs an admin key, and this server has none (security.admin_keys_file)."
            raise AuthenticationError(message, code="no_admin_keys")

    def is_admin(self, authorization: str | None) -> bool:
        """Whether the request may see the cluster."""
        try:
            self.check_admin(authorization)
        except AuthenticationError:
            return False
        return True


def authenticator(spec: SecuritySpec, environment: Mapping[str, str] = os.environ) -> Authenticator:
    """The keys `security` names.

    Raises:
        ConfigError: they cannot be read, or a line is wrong.
    """
    return Authenticator(_keys(spec, "api_keys", environment), _keys(spec, "admin_keys", environment))


def _keys(spec: SecuritySpec, kind: str, environment: Mapping[str, str]) -> Keys | None:
    file, variable = getattr(spec, f"{kind}_file"), getattr(spec, f"{kind}_env")
    if file is not None:
        return KeyFile(resolve(file), f"security.{kind}_file:")
    if variable is None:
        return None
    if variable not in environment:
        raise ConfigError(f"security.{kind}_env: the variable {variable} is not set where the Ingress runs.")
    return Keys(parse_keys(environment[variable], f"security.{kind}_env: the variable {variable}"))


def _record(authorization: str | None, sources: tuple[Keys, ...], wanted: str) -> KeyRecord:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError(f"Send {wanted} in the header 'Authorization: Bearer KEY'.", code="missing_api_key")
    digest = digest_of(key.strip())
    # A list: every source is asked, whichever one matches, so the time taken tells nothing.
    found = [record for record in [source.find(digest) for source in sources] if record is not None]
    if not found:
        raise AuthenticationError(f"The key sent is not {wanted} of this server.", code="invalid_api_key")
    return found[0]
