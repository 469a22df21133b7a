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
        file.write(secrets.token_hex(KEY_BYTES) + "\n")


def read_key_file(path: Path) -> bytes:
    """The key in `path`.

    Raises:
        ConfigError: no such file, no text in it, or fewer than 16 characters.
    """
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"security.cluster_key_file: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"security.cluster_key_file: {path} is no text; write the key as hex or base64.") from None
    if len(text) < 16:
        raise ConfigError(f"security.cluster_key_file: {path} holds {len(text)} characters; at least 16 are needed.")
    return text.encode()
