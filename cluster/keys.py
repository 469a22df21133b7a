"""The cluster key: what routers and expert replicas prove to each other, from a file or an environment variable.

Where the operator gives neither, `build` makes a file once and keeps it: replicas of a running application hold the
old key, so a new build must not change it. `make serve` instead makes a key of its own for each start and hands it
down in the environment, where later builds of the same start find it too.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from cluster.config import SecuritySpec, resolve
from cluster.errors import ConfigError

KEY_BYTES = 32
LEAST_CHARS = 16
MADE_KEY_FILE = ".expertscale/cluster.key"
# Group read stays allowed: Kubernetes mounts a secret as root's, with the group the container runs as.
_TOO_OPEN = stat.S_IRWXO | stat.S_IWGRP


def new_key() -> str:
    """A fresh random key as text."""
    return secrets.token_hex(KEY_BYTES)


def cluster_key(spec: SecuritySpec, environment: Mapping[str, str]) -> bytes:
    """The key by `security`: of the file it names, else of the variable, else of the file `provide_key` made.

    Raises:
        ConfigError: there is none, it is too short, or anybody can read its file.
    """
    if spec.cluster_key_file is None and (text := environment.get(spec.cluster_key_env)) is not None:
        return _checked(text, f"security.cluster_key_env: the variable {spec.cluster_key_env}")
    return read_key_file(resolve(spec.cluster_key_file or MADE_KEY_FILE))


def provide_key(spec: SecuritySpec, environment: Mapping[str, str]) -> None:
    """Make sure that there is a cluster key: make a file where neither file nor variable gives one.

    Raises:
        ConfigError: it cannot be written.
    """
    if spec.cluster_key_file is not None or spec.cluster_key_env not in environment:
        make_key_file(resolve(spec.cluster_key_file or MADE_KEY_FILE))


def make_key_file(path: Path) -> None:
    """Write a new random key to `path`, readable by its owner only, unless there is a file already.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if path.exists():
            return
        raise ConfigError(f"security.cluster_key_file: {path} cannot be written: {error.strerror}.") from None
    with os.fdopen(handle, "w") as file:
        file.write(new_key() + "\n")


def read_key_file(path: Path) -> bytes:
    """The key in `path`.

    Raises:
        ConfigError: no such file, anybody may read it or its group may write it, no text in it, or fewer than 16
            characters.
    """
    what = f"security.cluster_key_file: {path}"
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read()
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}.") from None
    if mode & _TOO_OPEN:
        raise ConfigError(f"{what} has mode {mode:04o}, open to others than its owner; run `chmod 600 {path}`.")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is no text; write the key as hex or base64.") from None
    return _checked(text, what)


def _checked(text: str, what: str) -> bytes:
    key = text.strip()
    if len(key) < LEAST_CHARS:
        raise ConfigError(f"{what} holds {len(key)} characters; at least {LEAST_CHARS} are needed.")
    return key.encode("utf-8", "surrogateescape")
