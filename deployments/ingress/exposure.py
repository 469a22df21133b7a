"""Whether the HTTP API may be opened on an address: beyond this machine only with API keys, or where that is said.

Asked twice, with the same answer: by the check of a config file, and by each Ingress replica, for those who give Serve
a file without checking it.
"""

from __future__ import annotations

import ipaddress

from cluster.config import SecuritySpec
from cluster.errors import ConfigError

EVERYWHERE = "0.0.0.0"  # noqa: S104 - a name for it; nothing listens here


def refuse_open(host: str | None, security: SecuritySpec) -> None:
    """host: what the HTTP proxies listen on; None where there are none.

    Raises:
        ConfigError: others than this machine would reach the model, and nobody is asked for a key.
    """
    if security.asks_for_keys or security.allow_open or host is None or is_loopback(host):
        return
    raise ConfigError(
        f"http_options.host: {host!r} can be reached from other machines and no API key is asked for; set "
        "security.api_keys_file (or api_keys_env), or http_options.host: 127.0.0.1, or security.allow_open: true."
    )


def is_loopback(host: str) -> bool:
    """Is `host` an address of this machine that no other machine reaches? Names other than localhost are not known."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
