"""Where the API may be opened without keys."""

from __future__ import annotations

import pytest

from cluster.config import SecuritySpec
from cluster.errors import ConfigError
from deployments.ingress.exposure import is_loopback, refuse_open


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST"])
def test_loopback_is_open_to_this_machine_alone(host: str) -> None:
    assert is_loopback(host)
    refuse_open(host, SecuritySpec())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "192.0.2.1", "example.org", "localhost.example.org", ""])
def test_any_other_address_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match=r"http_options\.host: .* security\.allow_open: true\.$"):
        refuse_open(host, SecuritySpec())
    with pytest.raises(ConfigError):  # who may see the cluster says nothing about who may generate
        refuse_open(host, SecuritySpec(admin_keys_file="admins"))
    refuse_open(host, SecuritySpec(api_keys_file="keys"))
    refuse_open(host, SecuritySpec(api_keys_env="KEYS"))
    refuse_open(host, SecuritySpec(allow_open=True))


def test_where_nothing_listens_nothing_is_open() -> None:
    refuse_open(None, SecuritySpec())
