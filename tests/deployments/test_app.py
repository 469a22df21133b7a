"""`python -m deployments.app check`: every wrong config is one sentence that names key, value and what is allowed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.config import parse_args
from deployments.app import build, check
from deployments.ingress.keys import KeyRecord, digest_of
from tests.models import save
from tests.serving import ROOT

CONFIGS = ROOT / "deployments" / "configs"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts in each of two layers, in several shards."""
    return save("mixtral", tmp_path_factory.mktemp("checkpoint"), torch.float32)


@pytest.fixture(autouse=True)
def plans_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(tmp_path))


def write(folder: Path, checkpoint: Path, change: Callable[[Document], object] = lambda _: None) -> Path:
    """A valid config of the tiny checkpoint, after `change` has had its way with the arguments."""
    args: Document = {"model": {"path": str(checkpoint)}, "experts": {"groups": 4}, "router": {}}
    change(args)
    application = {"name": "a", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_a_valid_config_has_no_errors(tmp_path: Path, checkpoint: Path) -> None:
    assert check(write(tmp_path, checkpoint)) == []


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_config_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(ROOT))
    assert check(CONFIGS / name) == []


CASES: dict[str, tuple[Callable[[Document], object], tuple[str, ...]]] = {
    "unknown key": (
        lambda args: args["experts"].update(colour="blue"),
        ("experts.colour", "unknown key", "allowed here: ", "transport"),
    ),
    "unknown value": (
        lambda args: args["experts"].update(transport="pigeon"),
        ("experts.transport", "'pigeon'", "'stream', 'object_store', 'auto' or 'local'"),
    ),
    "missing checkpoint": (
        lambda args: args["model"].update(path="nowhere/at/all"),
        ("model.path", "nowhere/at/all", "Hugging Face checkpoint"),
    ),
    "more groups than experts": (
        lambda args: args["experts"].update(groups=9),
        ("experts.groups", "9", "allowed: 1 to 8"),
    ),
    "too few batch tokens": (
        lambda args: args["router"].update(max_batch_tokens=8),
        ("max_batch_tokens", "8", "max_sequences"),
    ),
    "placement without a file": (
        lambda args: args["experts"].update(placement="explicit"),
        ("experts.placement", "explicit", "file"),
    ),
    "missing keys file": (
        lambda args: args.update(security={"api_keys_file": "no-such-file"}),
        ("security.api_keys_file", "no-such-file", "cannot be read"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_value_is_one_sentence(case: str, tmp_path: Path, checkpoint: Path) -> None:
    change, words = CASES[case]
    errors = check(write(tmp_path, checkpoint, change))
    assert len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]
    assert errors[0].endswith(".")


def security_errors(tmp_path: Path, checkpoint: Path, host: str | None, **security: object) -> list[str]:
    """What `check` says of a config that listens on `host` with these `security` arguments."""
    path = write(tmp_path, checkpoint, lambda args: args.update(security=security))
    document = yaml.safe_load(path.read_text())
    document["http_options"] = {} if host is None else {"host": host}
    path.write_text(yaml.safe_dump(document))
    return check(path)


def test_no_address_beyond_this_machine_is_opened_without_keys(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "keys").write_text(KeyRecord("alice", digest_of("secret")).line())
    [error] = security_errors(tmp_path, checkpoint, "0.0.0.0")
    assert all(word in error for word in ("http_options.host", "'0.0.0.0'", "api_keys_file", "allow_open"))
    assert security_errors(tmp_path, checkpoint, "0.0.0.0", allow_open=True) == []
    assert security_errors(tmp_path, checkpoint, "0.0.0.0", api_keys_file="keys") == []
    assert security_errors(tmp_path, checkpoint, "0.0.0.0", api_keys_env="KEYS") == []
    assert security_errors(tmp_path, checkpoint, "127.0.0.1") == []
    assert security_errors(tmp_path, checkpoint, None) == []


def test_keys_that_cannot_be_used_are_found_before_the_start(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "plain").write_text("a-key-as-it-is\n")
    for name in ("api_keys_file", "admin_keys_file"):
        [error] = security_errors(tmp_path, checkpoint, None, **{name: "plain"})
        assert f"security.{name}" in error
        assert "keys hash NAME" in error
        assert "a-key-as-it-is" not in error
    (tmp_path / "cluster").write_text("x" * 64)
    (tmp_path / "cluster").chmod(0o644)
    [error] = security_errors(tmp_path, checkpoint, None, cluster_key_file="cluster")
    assert "security.cluster_key_file" in error
    assert "chmod 600" in error


def placed(tmp_path: Path, checkpoint: Path, groups: list[dict[int, list[int]]]) -> list[str]:
    (tmp_path / "placement.yaml").write_text(yaml.safe_dump({"groups": groups}))
    placement = {"strategy": "explicit", "file": "placement.yaml"}
    return check(write(tmp_path, checkpoint, lambda args: args["experts"].update(groups=2, placement=placement)))


def test_an_expert_in_two_groups_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    errors = placed(
        tmp_path,
        checkpoint,
        [{0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, {0: [3, 4, 5, 6, 7], 1: [4, 5, 6, 7]}],
    )
    assert len(errors) == 1
    assert "expert 3 of layer 0 is in experts-0 and experts-1" in errors[0]


def test_an_expert_in_no_group_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    errors = placed(tmp_path, checkpoint, [{0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, {0: [4, 5, 6], 1: [4, 5, 6, 7]}])
    assert len(errors) == 1
    assert "expert 7 of layer 0 is in no group" in errors[0]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_a_corrupt_shard_is_named(damage: str, tmp_path: Path, checkpoint: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(checkpoint, copy)
    shard = sorted(copy.glob("*.safetensors"))[1]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "garbage":
        shard.write_bytes(b"\xff" * 4096)
    else:
        shard.unlink()
    errors = check(write(tmp_path, copy))
    assert len(errors) == 1
    assert shard.name in errors[0]


def test_what_is_no_yaml_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications:\n  - name: [\n")
    errors = check(path)
    assert len(errors) == 1
    assert "is not valid YAML at line" in errors[0]
    assert check(tmp_path / "none.yaml") == [
        f"the config file {tmp_path / 'none.yaml'} cannot be read: No such file or directory."
    ]


def test_an_unknown_key_of_serve_is_refused_too(tmp_path: Path, checkpoint: Path) -> None:
    path = write(tmp_path, checkpoint)
    document = yaml.safe_load(path.read_text())
    document["applications"][0]["colour"] = "blue"
    path.write_text(yaml.safe_dump(document))
    errors = check(path)
    assert len(errors) == 1
    assert "applications.0.colour" in errors[0]


def test_the_command_fails_without_starting_ray(tmp_path: Path, checkpoint: Path) -> None:
    path = write(tmp_path, checkpoint, lambda args: args["experts"].update(groups=0))
    code = (
        "import sys; from deployments.app import main; status = main(sys.argv[1:]);"
        "import ray; assert not ray.is_initialized(); sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "check", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == "experts.groups: the value 0 is not allowed: Input should be greater than or equal to 1."
    )


ELASTIC: Document = {"experts": {"replicas": "elastic", "groups": 2}}


def elastic_errors(
    tmp_path: Path, checkpoint: Path, policy: Document | None, args: Document = ELASTIC, text: str = "version: 1\n"
) -> list[str]:
    """What `check` says of a config with this `autoscaling_policy`; `policy.yaml` in the root holds `text`."""
    (tmp_path / "policy.yaml").write_text(text)
    path = write(tmp_path, checkpoint, lambda known: known.update(args))
    document = yaml.safe_load(path.read_text())
    if policy is not None:
        document["applications"][0]["autoscaling_policy"] = policy
    path.write_text(yaml.safe_dump(document))
    return check(path)


def policy_of(function: str = "autoscale.serve_policy:ServePolicy", **kwargs: object) -> Document:
    return {"policy_function": function, "policy_kwargs": {"policy_file": "policy.yaml", **kwargs}}


def test_elastic_replicas_and_a_valid_policy_belong_together(tmp_path: Path, checkpoint: Path) -> None:
    assert elastic_errors(tmp_path, checkpoint, policy_of()) == []
    assert elastic_errors(tmp_path, checkpoint, policy_of(), {"router": {"replicas": "elastic"}}) == []


@pytest.mark.parametrize(
    ("policy", "args", "text", "words"),
    [
        (None, ELASTIC, "", ("experts.replicas", "'elastic'", "autoscaling_policy")),
        (None, {"router": {"replicas": "elastic"}}, "", ("router.replicas", "'elastic'")),
        (policy_of(), {}, "version: 1", ("autoscaling_policy", "nothing here is elastic")),
        (policy_of("autoscale.serve_policy:Nobody"), ELASTIC, "version: 1", ("policy_function", "Nobody", "use ")),
        (policy_of("no.such.module:Policy"), ELASTIC, "version: 1", ("policy_function", "no.such.module", "use ")),
        (policy_of(colour="blue"), ELASTIC, "version: 1", ("policy_kwargs", "colour", "policy_file")),
        (policy_of(policy_file="none.yaml"), ELASTIC, "version: 1", ("none.yaml", "cannot be read")),
        (policy_of(), ELASTIC, "version: 2", ("policy.yaml", "version", "2")),
        (policy_of(), ELASTIC, "version: 1\ngroups: [{match: nobody}]", ("policy.yaml", "nobody", "experts-")),
    ],
)
def test_a_policy_that_does_not_fit_is_one_sentence(
    policy: Document | None, args: Document, text: str, words: tuple[str, ...], tmp_path: Path, checkpoint: Path
) -> None:
    errors = elastic_errors(tmp_path, checkpoint, policy, args, text)
    assert len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]


def test_elastic_replicas_have_wide_bounds_and_routers_report_even_where_their_number_is_fixed(
    checkpoint: Path,
) -> None:
    experts = {"groups": 1, "pools": {"h100": {}}, "replicas": "elastic", "max_replicas_hard": 5}
    application = build(
        parse_args({"model": {"path": str(checkpoint)}, "experts": experts, "router": {"replicas": 2}})
    )._bound_deployment
    home, pool = (bound._bound_deployment._deployment_config.autoscaling_config for bound in application.init_args[-1])
    assert (home.min_replicas, home.initial_replicas, home.max_replicas) == (1, None, 5)
    assert (pool.min_replicas, pool.max_replicas) == (0, 5)
    assert (home.upscale_delay_s, home.downscale_delay_s) == (0, 0)
    router = application.init_args[2]._bound_deployment._deployment_config.autoscaling_config
    assert (router.min_replicas, router.max_replicas) == (2, 2)


def test_a_pool_without_replicas_is_deployed_at_zero(checkpoint: Path) -> None:
    pools = {"h100": {}, "l4": {"replicas": 2}}
    application = build(
        parse_args({"model": {"path": str(checkpoint)}, "experts": {"groups": 1, "pools": pools, "replicas": 3}})
    )
    groups = application._bound_deployment.init_args[-1]
    asked = {bound._bound_deployment.name: bound._bound_deployment._deployment_config for bound in groups}
    assert sorted(asked) == ["experts-0", "experts-0-h100", "experts-0-l4"]
    assert [asked[name].num_replicas for name in ("experts-0", "experts-0-l4")] == [3, 2]
    bounds = asked["experts-0-h100"].autoscaling_config
    assert (bounds.min_replicas, bounds.initial_replicas) == (0, 0)


def test_the_replicas_of_a_group_may_be_those_of_another_pool_alone(checkpoint: Path) -> None:
    experts = {"groups": 2, "replicas": {"experts-1": 0}, "pools": {"h100": {"replicas": {"experts-1": 3}}}}
    application = build(parse_args({"model": {"path": str(checkpoint)}, "experts": experts}))
    groups = application._bound_deployment.init_args[-1]
    asked = {bound._bound_deployment.name: bound._bound_deployment._deployment_config for bound in groups}
    assert [asked[name].num_replicas for name in ("experts-0", "experts-1-h100")] == [1, 3]
    for name in ("experts-1", "experts-0-h100"):
        bounds = asked[name].autoscaling_config
        assert (bounds.min_replicas, bounds.initial_replicas) == (0, 0)


def test_every_queue_is_bounded_and_only_the_engine_makes_requests_wait(checkpoint: Path) -> None:
    """All a router may have accepted, and as many again that are being refused, reach it without a wait at a handle."""
    router = {"replicas": 3, "max_sequences": 8, "max_queued_requests": 12}
    ingress = build(parse_args({"model": {"path": str(checkpoint)}, "router": router}))._bound_deployment
    http, calls = (bound._deployment_config for bound in (ingress, ingress.init_args[2]._bound_deployment))
    assert calls.max_ongoing_requests >= 2 * (8 + 12)
    assert calls.max_queued_requests == 12
    assert http.max_ongoing_requests >= 3 * 2 * (8 + 12)
    assert 0 < http.max_queued_requests <= http.max_ongoing_requests
    assert (http.backpressure_config.status_code, http.backpressure_config.retry_after_s) == (429, 1)


def test_whatever_hangs_is_found_within_half_a_minute(checkpoint: Path) -> None:
    ingress = build(parse_args({"model": {"path": str(checkpoint)}, "experts": {"groups": 2}}))._bound_deployment
    router, directory, groups = ingress.init_args[2:]
    parts = [ingress, *(bound._bound_deployment for bound in (router, directory, *groups))]
    assert len(parts) == 5
    for config in (part._deployment_config for part in parts):
        assert 3 * (config.health_check_period_s + config.health_check_timeout_s) <= 30
        assert config.health_check_timeout_s >= 5, "a busy machine is no hung one"


def test_a_new_version_starts_beside_the_old_one_which_may_finish_the_longest_request(checkpoint: Path) -> None:
    ingress = {"request_timeout_s": 321.0}
    application = build(
        parse_args({"model": {"path": str(checkpoint)}, "experts": {"groups": 2}, "ingress": ingress})
    )._bound_deployment
    front, router, directory, groups = application, *(application.init_args[i] for i in (2, 3, 4))
    bound = [front, *(each._bound_deployment for each in (router, directory, *groups))]
    configs = {each.name: each._deployment_config for each in bound}
    assert configs.keys() == {"Ingress", "Router", "Directory", "experts-0", "experts-1"}
    assert {config.max_surge_percent for config in configs.values()} == {100}
    # No request waits for the Directory: there is nothing for it to finish.
    assert all(config.graceful_shutdown_timeout_s > 321 for name, config in configs.items() if name != "Directory")
