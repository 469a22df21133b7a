"""Key files: the cluster key that routers and expert replicas prove to each other."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cluster.errors import ConfigError

KEY_BYTES = 32


def make_key_file(path: Path) -> None:
    """Write a new random key to `path`, readable by its owner only, unless there is a file already.

    A key is made once and kept: replicas of a running application hold the old one, so a new build must not change it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")


def read_key_file(path: Path) -> bytes:
    """The key in `path`.

    Raises:
        ConfigError: no such file, or fewer than 16 bytes in it.
    """
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"security.cluster_key_file: {path} cannot be read: {error.strerror}.") from None
    if len(text) < 16:
        raise ConfigError(f"security.cluster_key_file: {path} holds {len(text)} characters; at least 16 are needed.")
    return text.encode()
