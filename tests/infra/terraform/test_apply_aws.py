"""The AWS module applied for real by Terraform and its provider, against moto, a double of AWS's interfaces.

What moto lacks is left out by moto_override.tf. Whether a second apply changes nothing, and destroy, are not checked:
moto's answers differ from AWS's there.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from tests.infra.terraform import chart_values
from tests.infra.terraform.terraform_runs import HERE, Module, need_tools

START_S = 60
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
VARIABLES = {
    "region": "us-east-1",
    "zones": ["us-east-1a", "us-east-1b"],
    "admin_arns": ["arn:aws:iam::123456789012:role/operators"],
    "model_bucket": "expertscale-test-models",
    "checkpoint": "mixtral",
    "redis_auth_token": "not-a-real-token-0123",
}
ASK = """
import boto3, json, sys
eks, ec2, s3 = (boto3.client(name, endpoint_url=sys.argv[1], region_name="us-east-1") for name in ("eks", "ec2", "s3"))
groups = [
    eks.describe_nodegroup(clusterName="expertscale", nodegroupName=name)["nodegroup"]
    for name in eks.list_nodegroups(clusterName="expertscale")["nodegroups"]
]
print(json.dumps({
    "groups": {
        group["labels"]["expertscale.io/pool"] + "/" + group["capacityType"]:
            [group["instanceTypes"], group.get("taints")]
        for group in groups
    },
    "public": s3.get_public_access_block(Bucket="expertscale-test-models")["PublicAccessBlockConfiguration"],
    "encryption": s3.get_bucket_encryption(Bucket="expertscale-test-models")
        ["ServerSideEncryptionConfiguration"]["Rules"][0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"],
    "gateways": len(ec2.describe_nat_gateways()["NatGateways"]),
}))
"""


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a moto server with AWS's managed policies."""
    python = need_tools()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen(
        [str(python.with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        env=environment | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        _await(f"http://127.0.0.1:{port}/moto-api/", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture(scope="module")
def applied(aws: Module, moto: str, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """The module with everything that moto knows made."""
    module = aws.copied(tmp_path_factory.mktemp("applied") / "aws")
    (module.folder / "moto_override.tf").write_text((HERE / "moto_override.tf").read_text())
    (module.folder / "test.auto.tfvars.json").write_text(json.dumps(VARIABLES))
    done = module.run("apply", "-auto-approve", "-input=false", "-parallelism=30", AWS_ENDPOINT_URL=moto, **CREDENTIALS)
    assert done.returncode == 0, done.stdout
    return module


@pytest.mark.usefixtures("applied")
def test_what_was_made_is_what_was_asked_for(moto: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | CREDENTIALS
    answer = subprocess.run(
        [str(need_tools()), "-c", ASK, moto], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    made = json.loads(answer.stdout)
    taint = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NO_SCHEDULE"}]
    assert {name: taints for name, (_, taints) in made["groups"].items() if taints} == {
        "a10g/ON_DEMAND": taint,
        "a10g/SPOT": taint,
        "l4/SPOT": taint,
        "h100/ON_DEMAND": taint,
    }
    assert made["groups"]["cpu/ON_DEMAND"][0] == ["m6i.2xlarge"]
    assert set(made["public"].values()) == {True}
    assert made["encryption"] == "aws:kms"
    assert made["gateways"] == 1


def test_no_secret_is_in_the_outputs(applied: Module) -> None:
    assert VARIABLES["redis_auth_token"] not in applied.run("output", "-json").stdout


def test_the_chart_takes_the_values_it_hands_out(applied: Module) -> None:
    outputs = json.loads(applied.run("output", "-json").stdout)
    chart_values.check("aws", yaml.safe_load(outputs["helm_values"]["value"]))


def _await(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert server.poll() is None, "moto stopped while starting"
        assert time.monotonic() < deadline, f"moto did not answer within {START_S} s"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
