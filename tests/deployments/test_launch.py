"""What the launcher gives `serve run` along. The rest of it is tests/e2e's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from deployments import config_file
from deployments.launch import main, recorded_cluster_that_is_gone, serve_environment
from tests.serving import ROOT, free_port

DEMO = ROOT / "deployments" / "configs" / "demo.yaml"


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


def test_the_variable_is_one_that_ray_names() -> None:
    from ray.serve import schema

    assert config_file.ENCODING_VARIABLE in vars(schema)
    assert set(config_file.ENCODINGS) == {each.value for each in schema.EncodingType}


@pytest.mark.parametrize(
    ("variable", "config", "expected"),
    [
        (None, {}, "TEXT"),
        (None, {"encoding": "JSON"}, "JSON"),
        ("JSON", {}, "JSON"),
        ("TEXT", {"encoding": "JSON"}, "TEXT"),
        ("", {"encoding": "JSON"}, "JSON"),
    ],
)
def test_the_variable_goes_before_the_config_and_reaches_all_of_it(
    variable: str | None, config: dict[str, str], expected: str
) -> None:
    demo = config_file.read(DEMO)
    assert "logging_config" not in yaml.safe_load(demo.derived(8000, {}))
    [application] = demo.document["applications"]
    own = {"name": "Router", "logging_config": {"log_level": "DEBUG", "encoding": "TEXT"}}
    document = {**demo.document, "applications": [{**application, "deployments": [own]}], "logging_config": config}
    file = config_file.ConfigFile(DEMO, document, demo.args)
    environ = {} if variable is None else {config_file.ENCODING_VARIABLE: variable}
    assert file.encoding(environ) == expected
    derived = yaml.safe_load(file.derived(8000, environ))
    assert derived.get("logging_config", {"encoding": "TEXT"}) == {"encoding": expected}
    [router] = derived["applications"][0]["deployments"]
    said = variable or config.get("encoding")
    assert router["logging_config"] == {"log_level": "DEBUG", "encoding": expected if said else "TEXT"}
    assert document["logging_config"] == config


@pytest.mark.parametrize(("variable", "expected"), [(None, "JSON"), ("TEXT", "TEXT")])
def test_an_application_that_asks_for_json_has_it_unless_the_variable_says_otherwise(
    variable: str | None, expected: str
) -> None:
    demo = config_file.read(DEMO)
    [application] = demo.document["applications"]
    own = {"name": "Router", "logging_config": {"encoding": "JSON"}}
    said = {**application, "logging_config": {"encoding": "JSON"}, "deployments": [own]}
    file = config_file.ConfigFile(DEMO, {**demo.document, "applications": [said]}, demo.args)
    environ = {} if variable is None else {config_file.ENCODING_VARIABLE: variable}
    assert file.encoding(environ) == expected
    [derived] = yaml.safe_load(file.derived(8000, environ))["applications"]
    assert derived["logging_config"] == derived["deployments"][0]["logging_config"] == {"encoding": expected}


def test_a_deployment_alone_that_asks_for_json_keeps_it() -> None:
    demo = config_file.read(DEMO)
    [application] = demo.document["applications"]
    own = {"name": "Router", "logging_config": {"encoding": "JSON"}}
    document = {**demo.document, "applications": [{**application, "deployments": [own]}]}
    file = config_file.ConfigFile(DEMO, document, demo.args)
    assert file.encoding({}) == "TEXT", "of everything else"
    derived = yaml.safe_load(file.derived(8000, {}))
    assert derived["applications"][0]["deployments"] == [own]
    assert "logging_config" not in derived


def test_another_encoding_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(config_file.ENCODING_VARIABLE, "json")
    assert main([str(DEMO), "--port", str(free_port())]) == 1
    assert capsys.readouterr().err == "RAY_SERVE_LOG_ENCODING: the value 'json' is not allowed: use TEXT or JSON.\n"
