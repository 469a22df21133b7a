"""The command plans, prints, writes a file that the configuration takes, and explains what is wrong in one sentence."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autoscale.fleet import fleet_of
from autoscale.policy_file import check_against
from autoscale.spec import PolicySpec
from cluster.blueprint import place
from cluster.config import PlacementSpec, parse_args
from cluster.errors import PlacementError
from cluster.placement import explicit, hot_aligned, read_groups
from cluster.placement.__main__ import main
from cluster.placement.devices import DeviceKind, Sizes, parse_bytes, parse_devices

COUNTS = {1: 8, 2: 8}


@pytest.fixture
def loads(tmp_path):
    file = tmp_path / "loads.json"
    rows = [[8, 1, 1, 1, 1, 2, 1, 1], [1, 1, 9, 1, 1, 1, 1, 1]]
    file.write_text(json.dumps({"layers": [1, 2], "domains": {"all": rows}}))
    return file


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", ["placement.json", "placement.yaml"])
def test_it_writes_the_file_that_the_configuration_takes(loads, tmp_path, capsys, name):
    out_file = tmp_path / name
    status, out, err = run(capsys, "--loads", loads, "--budget", 5, "--slots", 3, "--out", out_file)
    assert (status, err) == (0, "")
    groups = read_groups(out_file)
    placement = explicit(COUNTS, groups)
    assert all(len(ids) <= 3 for group in placement.groups for ids in group.values())
    spec = PlacementSpec(strategy="explicit", file=str(out_file))
    assert place(COUNTS, len(groups), spec) == placement
    assert f"Written to {out_file}" in out


def test_the_configuration_it_prints_is_valid_and_names_the_replicas(loads, tmp_path, capsys):
    out_file = tmp_path / "placement.yaml"
    _, out, _ = run(capsys, "--loads", loads, "--budget", 12, "--slots", 4, "--groups", 2, "--out", out_file)
    printed = out[out.index("\nexperts:") :]
    args = parse_args({"model": {"path": "m"}, **yaml.safe_load(printed)})
    assert sum(map(args.experts.replicas_of, args.experts.group_names)) == 12
    assert args.experts.placement.file == str(out_file)
    assert "experts-0: 9" not in out_file.read_text() or args.experts.max_replicas_hard >= 9
    assert [line for line in out_file.read_text().splitlines() if line.startswith("# experts-0: ")]


def test_more_replicas_than_the_usual_bound_raise_the_bound(loads, capsys):
    _, out, _ = run(capsys, "--loads", loads, "--budget", 12, "--slots", 8, "--groups", 1)
    args = parse_args({"model": {"path": "m"}, **yaml.safe_load(out[out.index("\nexperts:") :])})
    assert args.experts.max_replicas_hard == args.experts.replicas_of("experts-0") == 12


def test_it_shows_how_even_the_plan_is_beside_simpler_ones(loads, capsys):
    _, out, _ = run(capsys, "--loads", loads, "--budget", 4, "--slots", 4)
    imbalance = {
        line.split()[0]: float(line.split()[-2])
        for line in out.splitlines()
        if line.startswith(("this plan", "balanced", "hot_aligned", "contiguous"))
    }
    assert set(imbalance) == {"this", "balanced", "hot_aligned", "contiguous"}
    assert imbalance["this"] == min(imbalance.values())
    assert imbalance["this"] < imbalance["contiguous"]


def test_kinds_of_different_speed_come_with_rules_for_the_policy_file(loads, capsys):
    status, out, _ = run(capsys, "--loads", loads, "--budget", "l4:2:4:1,h100:1:8:4")
    assert status == 0
    rules = yaml.safe_load(out[out.index("\ngroups:") :])["groups"]
    assert {pool for rule in rules for pool in rule["pools"]} == {"default", "l4", "h100"}
    assert sum(rule["min_replicas"] for rule in rules) == 3 + len(rules), "and one at home in each group"
    assert "keep one replica there all the same" in out


@pytest.mark.parametrize("budget", ["l4:2:4:1,h100:1:8:4", "default:2:4:1,h100:1:8:4", "default:7:4,h100:7:8:2"])
def test_the_rules_it_prints_pass_the_check_of_policies(loads, budget, capsys):
    _, out, _ = run(capsys, "--loads", loads, "--budget", budget)
    policy = PolicySpec.model_validate(
        {"version": 1, "groups": yaml.safe_load(out[out.index("\ngroups:") :])["groups"]}
    )
    start, end = out.index("experts:\n"), out.index("with a pool")
    experts = yaml.safe_load(out[start:end])["experts"]
    experts |= {"pools": {part.split(":")[0]: {} for part in budget.split(",") if not part.startswith("default")}}
    config = parse_args({"model": {"path": "x"}, "experts": experts})
    assert list(check_against(policy, fleet_of(config))) == []


def test_moves_are_counted_from_the_placement_of_today(loads, tmp_path, capsys):
    today = tmp_path / "today.json"
    groups = [{1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, {1: [4, 5, 6, 7], 2: [4, 5, 6, 7]}]
    today.write_text(json.dumps({"groups": groups}))
    out_file = tmp_path / "new.json"
    common = ["--loads", loads, "--budget", 2, "--slots", 5, "--from", today, "--out", out_file]
    _, out, _ = run(capsys, *common, "--max-moves", 0)
    assert "0 of 16 experts change their group" in out
    assert read_groups(out_file) == groups
    _, out, _ = run(capsys, *common, "--max-moves", 2)
    before, after = (explicit(COUNTS, each).owner for each in (groups, read_groups(out_file)))
    moved = sum(a != b for layer in COUNTS for a, b in zip(before[layer], after[layer], strict=True))
    assert moved <= 2
    assert f"{moved} of 16 experts" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "3", "--slots", "2"], "--budget: 3 devices with 6 slots in all cannot hold the 8 experts"),
        (["--budget", "3"], "--budget: '3' does not say how many experts of a layer fit"),
        (["--budget", "l4:x:3"], "--budget: the count 'x' of 'l4:x:3' is not allowed; allowed: 1 to 512"),
        (["--budget", "0:3"], "--budget: the count '0' of '0:3' is not allowed; allowed: 1 to 512"),
        (["--budget", "l4:3:0"], "--budget: the slots '0' of 'l4:3:0' is not allowed; allowed: 1 to"),
        (["--budget", "l4:3:3:fast"], "--budget: the speed 'fast' of .* allowed: a number above 0"),
        (["--budget", "l4:3:3:-1"], "--budget: the speed '-1' of .* allowed: a number above 0"),
        (["--budget", "L4:3:3"], "--budget: 'L4:3:3' is no kind of device"),
        (["--budget", ""], "--budget: '' is no kind of device|--budget: the count ''"),
        (["--budget", "3:3,2:3"], "--budget: '3:3,2:3' names a kind of device twice"),
        (["--budget", "3:24GB"], "--budget: a memory says how many experts fit only with --expert-bytes"),
        (["--budget", "3", "--memory", "lots"], "--memory: 'lots' is not allowed; allowed: bytes above 0"),
        (["--budget", "3", "--memory", "1e3", "--expert-bytes", "1e3"], "--memory: 1000 bytes do not hold one expert"),
        (["--budget", "3", "--slots", "3", "--memory", "1e9"], "--slots and --memory both say"),
        (["--budget", "3", "--slots", "-3"], "--slots: '-3' is not allowed; allowed: a whole number of at least 1"),
        (["--budget", "3:3", "--groups", "2"], "--groups: 2 groups .* allowed: 3 to 3"),
        (["--budget", "3:3", "--groups", "two"], "--groups: 'two' is not allowed; allowed: a whole number"),
        (["--budget", "3:3", "--max-moves", "2"], "--max-moves counts moves from today's placement"),
        (["--budget", "3:3", "--out", "/nowhere/at/all"], "--out: /nowhere/at/all cannot be written: No such file"),
        (["--budget", "3:3", "--from", "/nowhere"], "the file /nowhere cannot be read: No such file"),
        ([], "The following arguments are required: --budget; --help says what is allowed"),
        (["--budget", "3:3", "--colour"], "Unrecognized arguments: --colour; --help"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_1(loads, capsys, arguments, message):
    with pytest.raises(PlacementError, match=message):
        raise_what_is_said(run(capsys, "--loads", loads, *arguments))


def raise_what_is_said(result):
    status, _, err = result
    assert status == 1
    assert err.count("\n") == 1
    raise PlacementError(err)


def test_help_shows_how_a_budget_is_written(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    assert "--budget l4:24:9:1.0,h100:8:18:2.5" in capsys.readouterr().out


def test_a_budget_names_kinds_with_slots_or_memory():
    sizes = Sizes(layers=58, slots=7, expert_bytes=44e6)
    assert parse_devices("32", sizes) == (DeviceKind("default", 32, 7),)
    assert parse_devices("l4:24:9:1.5, h100:8:80GB:2.5", sizes) == (
        DeviceKind("l4", 24, 9, 1.5),
        DeviceKind("h100", 8, 31, 2.5),
    )
    assert parse_devices("l4:24::2", sizes) == (DeviceKind("l4", 24, 7, 2.0),)
    assert parse_devices("4", Sizes(layers=2, memory_bytes=100, expert_bytes=10)) == (DeviceKind("default", 4, 5),)


@pytest.mark.parametrize(("text", "size"), [("80e9", 80e9), ("80GB", 80e9), ("24GiB", 24 * 2**30), ("1.5MB", 1.5e6)])
def test_bytes_may_have_a_unit(text, size):
    assert parse_bytes("--memory", text) == size


@given(st.text(max_size=12))
def test_any_text_as_a_budget_is_kinds_or_one_sentence(text):
    try:
        kinds = parse_devices(text, Sizes(layers=2, slots=3))
    except PlacementError as error:
        message = str(error)
    else:
        message = ""
        assert all(kind.count >= 1 and kind.slots >= 1 and kind.speed > 0 for kind in kinds)
    assert message == "" or message.startswith("--budget: ")


def test_hot_aligned_is_a_strategy_of_the_configuration(loads):
    spec = PlacementSpec(strategy="hot_aligned", file=str(loads))
    placement = place(COUNTS, 4, spec)
    assert placement == hot_aligned(COUNTS, 4, {1: [8, 1, 1, 1, 1, 2, 1, 1], 2: [1, 1, 9, 1, 1, 1, 1, 1]})
    assert placement.groups[0] == {1: (0, 5), 2: (0, 2)}
