"""The Serve config in the RayService passes Ray's schema, ours, the policy's, and the check run before a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from autoscale.fleet import fleet_of
from autoscale.policy_file import check_against, read
from cluster.config import parse_args
from cluster.errors import ConfigError
from deployments.app import check
from deployments.launch import serve_environment
from tests.helm.charts import CI_FILES, NEEDED, Document, Refused, ci, merged, only, pods, ray_service, render
from tests.serving import ROOT

CASES = {name.removesuffix("-values.yaml"): ci(name.removesuffix("-values.yaml")) for name in CI_FILES}
DEMO = ROOT / "infra" / "demo-model"
KEY_LINE = f"alice sha256:{'0' * 64}\n"


def config_of(values: Document) -> Document:
    """The Serve config that `values` render."""
    return yaml.safe_load(ray_service(values)["spec"]["serveConfigV2"])


def args_of(values: Document) -> Document:
    return config_of(values)["applications"][0]["args"]


def in_pod(tmp_path: Path, values: Document) -> Path:
    """The config as a file, with what it finds in a pod laid where this machine has it: the demo as model."""
    folder = tmp_path / "etc-expertscale"
    for name in ("api-keys", "admin-keys"):
        (folder / name).mkdir(parents=True)
        (folder / name / name).write_text(KEY_LINE)
    for document in render(values):
        kind, name = document["kind"], document["metadata"]["name"]
        for volume in ("policy", "files"):
            if kind == "ConfigMap" and name.endswith(f"-{volume}"):
                (folder / volume).mkdir()
                for file, text in document["data"].items():
                    (folder / volume / file).write_text(text)
    loads = folder / "files" / "expert_load.json"
    if loads.exists():
        loads.write_text((DEMO / "expert_load.json").read_text())
    config = config_of(values)
    config["applications"][0]["args"]["model"]["path"] = str(DEMO / "checkpoint")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config).replace("/etc/expertscale", str(folder)))
    return path


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_it_passes_rays_schema_ours_and_the_policys(values: Document, tmp_path: Path) -> None:
    config = config_of(values)
    ServeDeploySchema.model_validate(config)
    args = parse_args(config["applications"][0]["args"])
    assert args.experts.host == "node"
    assert config["logging_config"] == {"encoding": values["serve"].get("logEncoding", "TEXT")}
    documents = [d for d in render(values) if d["metadata"]["name"].endswith("-policy")]
    assert bool(documents) == (args.experts.elastic or args.router.elastic)
    for document in documents:
        path = tmp_path / "policy.yaml"
        path.write_text(document["data"]["policy.yaml"])
        assert check_against(read(path), fleet_of(args)) == []


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_it_passes_the_check_that_is_run_before_a_start(
    values: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(ROOT))
    assert check(in_pod(tmp_path, values)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serve": {"router": {"max_batch_tokens": 8}}}, "max_batch_tokens (8) is below max_sequences (128)"),
        ({"policy": {"spec": {"groups": [{"match": "experts-9"}]}}}, "it matches none of the groups"),
        ({"policy": {"spec": {"budget": {"gpus": {"default": 1}}}}}, "should be at least"),
    ],
)
def test_what_only_our_own_checks_know_is_found(
    change: Document, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(ROOT))
    assert any(said in line for line in check(in_pod(tmp_path, merged(ci("mixed-gpu"), change))))


def test_a_wrong_argument_is_refused_by_the_charts_schema_already() -> None:
    with pytest.raises(Refused, match="max_batch_tokenz"):
        render(merged(NEEDED, {"serve": {"router": {"max_batch_tokenz": 8}}}))
    with pytest.raises(ConfigError, match="max_batch_tokenz"):
        parse_args({"model": {"path": "x"}, "router": {"max_batch_tokenz": 8}})


@pytest.mark.parametrize(
    ("experts", "expected"),
    [({"hedge_after": None}, None), ({"hedge_after": 2.5}, 2.5), ({}, 3)],
)
def test_numbers_and_nulls_arrive_as_they_were_written(experts: Document, expected: Any) -> None:
    args = parse_args(args_of(merged(NEEDED, {"serve": {"experts": {**experts, "auto_threshold_bytes": 1 << 30}}})))
    assert args.experts.hedge_after == expected
    assert args.experts.auto_threshold_bytes == 1 << 30


def test_the_policy_is_mounted_as_a_folder_in_every_pod() -> None:
    """A file mounted alone, by `subPath`, would never be renewed."""
    values = ci("mixed-gpu")
    application = config_of(values)["applications"][0]
    assert application["autoscaling_policy"]["policy_kwargs"] == {"policy_file": "/etc/expertscale/policy/policy.yaml"}
    name = only(render(values), "ConfigMap", "mixed-policy")["metadata"]["name"]
    for template in pods(ray_service(values)).values():
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == "policy"]
        (mount,) = [m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "policy"]
        assert volume["configMap"] == {"name": name}
        assert mount == {"name": "policy", "mountPath": "/etc/expertscale/policy", "readOnly": True}


def test_a_config_map_of_ones_own_takes_the_place_of_the_policy() -> None:
    values = merged(ci("mixed-gpu"), {"policy": {"existingConfigMap": "mine"}})
    documents = render(values)
    assert not [d for d in documents if d["metadata"]["name"] == "mixed-policy"]
    head = pods(only(documents, "RayService"))["head"]
    assert {"name": "policy", "configMap": {"name": "mine"}} in head["spec"]["volumes"]


def test_keys_come_from_secrets_and_the_variables_of_serve_env_are_in_every_pod() -> None:
    values = ci("mixed-gpu")
    security = args_of(values)["security"]
    assert security["api_keys_file"] == "/etc/expertscale/api-keys/api-keys"
    assert security["admin_keys_file"] == "/etc/expertscale/admin-keys/admin-keys"
    threads = dict(line.split("=", 1) for line in (ROOT / "threads.env").read_text().splitlines())
    for template in pods(ray_service(values)).values():
        env = {variable["name"]: variable for variable in template["spec"]["containers"][0]["env"]}
        assert len(env) == len(template["spec"]["containers"][0]["env"])
        for name, value in {**serve_environment(), **threads}.items():
            assert env[name]["value"] == value
        key = env[security["cluster_key_env"]]["valueFrom"]["secretKeyRef"]
        assert key == {"name": "expertscale", "key": "cluster-key"}
        secrets = {v["name"]: v["secret"] for v in template["spec"]["volumes"] if "secret" in v}
        assert secrets["api-keys"] == {"secretName": "expertscale", "defaultMode": 0o440}
