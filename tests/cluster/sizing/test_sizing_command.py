"""The command reports, writes a config that passes the check, and explains what is wrong in one sentence."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.blueprint import place
from cluster.config import parse_args
from cluster.sizing import memory
from cluster.sizing.__main__ import main
from deployments.app import check
from deployments.ingress.exposure import refuse_open
from deployments.router.runtime import PAGE_TOKENS
from tests.cluster.sizing.shapes import MODELS, PUBLISHED
from tests.models import save

FLEETS = {
    "deepseek-v2-lite": "rtx4070=12GB:4,h100=80GB:2",
    "mixtral-8x7b": "rtx4070:12,h100:1",
    "qwen3-235b-a22b": "l40s:12,h100:2",
    "deepseek-v3": "h100:20,h200:2",
}


def run(capsys, *arguments):
    status = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def size(capsys, name, *arguments):
    return run(capsys, "--model", MODELS / name / "config.json", "--gpus", FLEETS[name], *arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_report_says_what_is_computed_measured_and_assumed(name, capsys):
    status, out, err = size(capsys, name)
    assert (status, err) == (0, "")
    for word in ("(computed)", "measured", "(assumed)", "node pool", "tokens/s", "Not in it"):
        assert word in out
    assert max(map(len, out.splitlines())) < 150


def test_a_bandwidth_that_nobody_gave_is_asked_for(capsys):
    _, out, _ = run(capsys, "--model", MODELS / "deepseek-v2-lite", "--gpus", "a100=40GB:2,h100:2")
    assert "The bandwidth of a100 is unknown" in out
    assert "give it as in --gpus a100=40GB@600GB." in out
    assert "bandwidth of h100" not in out


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_holds_the_same_plan(name, capsys):
    _, out, _ = size(capsys, name, "--json")
    found = json.loads(out)
    usable = {pool["name"]: pool["usable_bytes"] for pool in found["pools"]}
    assert found["model"]["total_numbers"] == pytest.approx(PUBLISHED[name], rel=0.01)
    assert sum(group["experts"] for group in found["groups"]) == sum(found["model"]["experts"].values())
    for group in found["groups"]:
        assert all(group["weights_bytes"] + group["step_bytes"] <= usable[pool] for pool in group["replicas"])
    assert [step["sequences"] for step in found["steps"]] == [1, 8, 32, 64]
    assert all(step["total_s"] > 0 for step in found["steps"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_is_valid_and_its_placement_holds_every_expert(name, tmp_path, capsys):
    status, _, err = size(capsys, name, "--config", tmp_path / "big.yaml")
    assert status == 0
    assert "Written to" in err
    document = yaml.safe_load((tmp_path / "big.yaml").read_text())
    args = parse_args(document["applications"][0]["args"])
    refuse_open(ServeDeploySchema.model_validate(document).http_options.host, args.security)
    found = json.loads(size(capsys, name, "--json")[1])
    experts = {int(layer): count for layer, count in found["model"]["experts"].items()}
    placement = place(experts, args.experts.groups, args.experts.placement)
    assert len(placement.groups) == len(found["groups"])
    pools = {"default": args.experts.resources, **{name: pool.resources for name, pool in args.experts.pools.items()}}
    for group in found["groups"]:
        asked = {
            pools[pool].label_selector["gpu"]: count
            for pool in pools
            if (count := args.experts.replicas_of(group["name"], pool))
        }
        assert asked == group["replicas"]


def test_the_config_passes_the_check_of_the_application(tmp_path, capsys):
    """Experts that fill one kind of device, so that some group lives in another pool alone."""
    folder = tmp_path / "model"
    save("deepseek_v3", folder, torch.float32)
    common = ["--dtype", "float32", "--batch-tokens", 64, "--sequences", 8, "--kv-tokens", 256, "--reserve", 0]
    status, _, err = run(
        capsys,
        *("--model", folder / "config.json", "--gpus", "tiny=0.25MB@1MB:2,large=2MB@0.001MB:2", *common),
        *("--config", tmp_path / "config.yaml"),
    )
    assert status == 0, err
    assert check(tmp_path / "config.yaml") == []
    experts = yaml.safe_load((tmp_path / "config.yaml").read_text())["applications"][0]["args"]["experts"]
    assert list(experts["pools"]) == ["tiny"] or list(experts["pools"]) == ["large"]


def test_a_page_of_the_pool_is_that_of_the_router():
    assert memory.PAGE_TOKENS == PAGE_TOKENS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "rtx9999"], "--gpus: 'rtx9999' is not known; give its memory as in rtx9999=24GB, or one of a100"),
        (["--gpus", "H100:2"], "--gpus: 'H100:2' is not allowed; allowed: NAME[=MEMORY[@BANDWIDTH]][:COUNT]"),
        (["--gpus", "default=24GB"], "--gpus: 'default=24GB' is not allowed"),
        (["--gpus", ""], "--gpus: '' is not allowed"),
        (["--gpus", "h100:0"], "--gpus: the count '0' of 'h100:0' is not allowed; allowed: 1 to 512"),
        (["--gpus", "h100:"], "--gpus: the count '' of 'h100:' is not allowed"),
        (["--gpus", "h100=lots"], "--gpus: 'lots' is not allowed; allowed: bytes above 0"),
        (["--gpus", "h100=80GB@"], "--gpus: '' is not allowed; allowed: bytes above 0"),
        (["--gpus", "h100,h100:2"], "--gpus: 'h100,h100:2' names a kind twice; allowed: each kind once"),
        (["--gpus", "h100:500,l4:13"], "--gpus: 'h100:500,l4:13' are too many; allowed: up to 512"),
        (["--gpus", "h100=80:4"], "--gpus: 'h100=80:4' has 80 bytes; did you mean h100=80GB?"),
        (["--gpus", "h100:3", "--label", "g p:u"], "--label: 'g p:u' is not allowed; allowed: up to 63 letters"),
        (["--gpus", "h100:1"], "--gpus: the experts need 90.2 GB, but beside the routers is room for 0.0 GB"),
        (["--gpus", "h100:2", "--kv-tokens", "100"], "--kv-tokens: '100' is not allowed; allowed: a whole number of"),
        (
            ["--gpus", "h100:2", "--routers", "0"],
            "--routers: '0' is not allowed; allowed: a whole number of at",
        ),
        (["--gpus", "h100:2", "--batch-tokens", "8"], "--batch-tokens: 8 is below --sequences (64)"),
        (["--gpus", "h100:2", "--reserve", "1"], "--reserve: '1' is not allowed; allowed: a number from 0 to 0.9"),
        (["--gpus", "h100:2", "--link-gbit", "0"], "--link-gbit: '0' is not allowed; allowed: a number above 0"),
        (["--gpus", "h100:2", "--link-gbit", "nan"], "--link-gbit: 'nan' is not allowed"),
        (["--gpus", "h100:2", "--dtype", "int4"], "--dtype: 'int4' is not allowed"),
        (["--gpus", "h100:9", "--loads", "/nowhere"], "the file /nowhere cannot be read: No such file"),
        (["--gpus", "h100:3", "--config", "/nowhere/at/all"], "--config: /nowhere/at/all"),
        ([], "The following arguments are required: --gpus; --help says what is allowed"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_1(arguments, message, capsys):
    status, _, err = run(capsys, "--model", MODELS / "mixtral-8x7b", *arguments)
    assert status == 1
    assert err.startswith(message), err
    assert err.count("\n") == 1


def test_a_folder_without_a_config_is_named(tmp_path, capsys):
    status, _, err = run(capsys, "--model", tmp_path, "--gpus", "h100:2")
    assert (status, err) == (1, f"the checkpoint {tmp_path} lacks config.json.\n")


def test_a_line_break_in_what_was_typed_is_none_in_the_file(tmp_path, capsys):
    arguments = ("--model", MODELS / "mixtral-8x7b", "--gpus", "h100:2,\n h200:2", "--config", tmp_path / "c.yaml")
    assert run(capsys, *arguments)[0] == 0
    assert list(yaml.safe_load((tmp_path / "c.yaml").read_text())) == ["proxy_location", "http_options", "applications"]


def test_a_reader_that_had_enough_is_no_error():
    command = [sys.executable, "-m", "cluster.sizing", "--model", str(MODELS / "mixtral-8x7b"), "--gpus", "h100:3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


README_ROW = re.compile(
    r"^\| [\w.-]+ \| `(.*?)` \| (.*?) GB \| (.*?) GB \| router (\w+).* \| .* \| (.*) / (.*) ms \|$", re.MULTILINE
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_the_readme_is_what_the_command_computes(name, capsys):
    rows = {row[0]: row[1:] for row in README_ROW.findall((MODELS.parents[1] / "README.md").read_text())}
    found = json.loads(size(capsys, name, "--json")[1])
    router, experts, pool, first, last = rows[",".join(f"{each['name']}:{each['count']}" for each in found["pools"])]
    assert router == f"{found['router']['total_bytes'] / 1e9:,.1f}"
    assert experts == f"{sum(group['weights_bytes'] for group in found['groups']) / 1e9:,.1f}"
    assert pool == found["router"]["pool"]
    for said, step in ((first, found["steps"][0]), (last, found["steps"][-1])):
        assert float(said) == pytest.approx(1e3 * step["total_s"], abs=0.5 if "." not in said else 0.051)
