"""What the launcher gives `serve run` along. The rest of it is tests/e2e's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments.launch import recorded_cluster_that_is_gone, serve_environment


def test_the_variables_of_serve_env_are_those_that_serve_reads() -> None:
    from ray.serve._private import constants

    variables = serve_environment()
    assert variables
    for name, value in variables.items():
        assert value
        assert hasattr(constants, name)


def test_a_recorded_cluster_counts_as_gone_only_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert recorded_cluster_that_is_gone() is None
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        record.write_text(address)
        assert recorded_cluster_that_is_gone() is None
    assert recorded_cluster_that_is_gone() == address
    record.write_text("no address")
    assert recorded_cluster_that_is_gone() == "no address"


def test_the_record_is_where_ray_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._common.utils import get_ray_address_file

    from deployments import launch

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert str(launch._record()) == get_ray_address_file(None)
