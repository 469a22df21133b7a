"""Every wrong setting is named with its key, its value and what is allowed. Well under a second."""

import pytest

from cluster.config import AppConfig, ExpertsSpec, ModelSpec, ResourceSpec, deployment_name, parse_args, resolve
from cluster.errors import ConfigError


def with_parts(**parts):
    return {"model": {"path": "some/model"}, **parts}


def errors_of(args):
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    return str(caught.value).splitlines()


def test_only_the_model_path_is_required():
    config = parse_args({"model": {"path": "some/model"}})
    assert config.model.served_name == "model"
    assert config.experts.group_names == ("experts-0", "experts-1", "experts-2", "experts-3")
    assert parse_args(config.model_dump()) == config


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({}, "model: missing, and it has no default."),
        (None, "args: the value None is not allowed: Input should be a valid dictionary."),
        ({"model": "x"}, "model: the value 'x' is not allowed: Input should be a valid dictionary."),
        ({"model": {"path": ""}}, "model.path: the value '' is not allowed: String should have at least 1 character."),
        (
            with_parts(frobnicate=1),
            "frobnicate: unknown key; allowed here: experts, ingress, model, router, security.",
        ),
        (with_parts(model={"path": "x", "dtype": "int8"}), "'float32', 'bfloat16' or 'float16'."),
        (
            with_parts(experts={"groups": 0}),
            "experts.groups: the value 0 is not allowed: Input should be greater than or equal to 1.",
        ),
        (with_parts(experts={"groups": True}), "experts.groups: the value True is not allowed:"),
        (with_parts(experts={"groups": "four"}), "experts.groups: the value 'four' is not allowed:"),
        (with_parts(experts={"wait_s": float("nan")}), "experts.wait_s: the value nan is not allowed:"),
        (with_parts(experts={"wait_s": -1}), "experts.wait_s: the value -1 is not allowed:"),
        (with_parts(experts={"emulate": {"rows_per_s": float("inf")}}), "experts.emulate.rows_per_s: the value inf"),
        (
            with_parts(experts={"emulate": {"rows_per_s": 1, "rows": 1}}),
            "experts.emulate.rows: unknown key; allowed here: rows_per_s.",
        ),
        (with_parts(experts={"transport": "pigeon"}), "experts.transport: the value 'pigeon' is not allowed:"),
        (with_parts(experts={"placement": "balanced"}), "strategy 'balanced' needs `file`."),
        (with_parts(experts={"placement": {"file": "f"}}), "strategy 'contiguous' takes no `file`."),
        (with_parts(experts={"placement": "random"}), "'contiguous', 'balanced', 'hot_aligned' or 'explicit'."),
        (with_parts(experts={"replicas": 0}), "experts.replicas: the value 0 is not allowed:"),
        (
            with_parts(experts={"replicas": "two"}),
            "experts.replicas: the value 'two' is not allowed: Input should be a number of replicas or 'elastic'.",
        ),
        (
            with_parts(router={"replicas": "two"}),
            "router.replicas: the value 'two' is not allowed: Input should be a number of replicas or 'elastic'.",
        ),
        (
            with_parts(experts={"replicas": "elastic", "pools": {"h100": {"replicas": 1}}}),
            "`replicas` is 'elastic', so no pool can have `replicas` of its own; leave them out.",
        ),
        (
            with_parts(experts={"replicas": {"experts-0": 0}}),
            "'experts-0' has no replica in any pool; allowed: at least one somewhere.",
        ),
        (
            with_parts(experts={"replicas": {"experts-4": 1}}),
            "`replicas` names 'experts-4', but the groups are experts-0 to experts-3.",
        ),
        (
            with_parts(experts={"replicas": 9}),
            "experts: the value is not allowed: `replicas` is 9; allowed: up to max_replicas_hard (8).",
        ),
        (with_parts(experts={"replicas": {"experts-1": 9}}), "`replicas` is 9; allowed: up to max_replicas_hard (8)."),
        (with_parts(experts={"pools": {"h100": {"replicas": 9}}}), "`pools.h100.replicas` is 9; allowed: up to"),
        (
            with_parts(experts={"pools": {"h100": {"replicas": {"experts-1": 9}}}}),
            "`pools.h100.replicas` is 9; allowed: up to",
        ),
        (
            with_parts(experts={"pools": {"h100": {"replicas": {"experts-9": 1}}}}),
            "`pools.h100.replicas` names 'experts-9', but the groups are experts-0 to experts-3.",
        ),
        (
            with_parts(experts={"pools": {"h100": {"replicas": -1}}}),
            "experts.pools.h100.replicas: the value -1 is not allowed: Input should be greater than or equal to 0.",
        ),
        (
            with_parts(experts={"pools": {"h100": {"replicas": "elastic"}}}),
            "experts.pools.h100.replicas: the value 'elastic' is not allowed: Input should be a valid integer "
            "greater than or equal to 0.",
        ),
        (with_parts(experts={"pools": {"H100": {}}}), "experts.pools: the value is not allowed: pool name 'H100': use"),
        (with_parts(experts={"pools": {"default": {}}}), "pool name 'default': use"),
        (
            with_parts(experts={"pools": {"h100": {"gpus": 1}}}),
            "experts.pools.h100.gpus: unknown key; allowed here: emulate, replicas, resources.",
        ),
        (
            with_parts(experts={"pools": {"replicas": {"gpus": 1}}}),
            "experts.pools.replicas.gpus: unknown key; allowed here: emulate, replicas, resources.",
        ),
        (
            with_parts(experts={"pools": {"emulate": {"resources": {"gpus": 1}}}}),
            "experts.pools.emulate.resources.gpus: unknown key; allowed here: accelerator_type, label_selector,",
        ),
        (
            with_parts(experts={"resources": {"num_cpus": -1}}),
            "experts.resources.num_cpus: the value -1 is not allowed:",
        ),
        (with_parts(experts={"wait_s": True}), "experts.wait_s: the value True is not allowed:"),
        (with_parts(experts={"emulate": {"rows_per_s": True}}), "experts.emulate.rows_per_s: the value True is not"),
        (with_parts(router={"resources": {"num_gpus": True}}), "router.resources.num_gpus: the value True is not"),
        (with_parts(router={"kv_tokens": 8}), "router.kv_tokens: the value 8 is not allowed:"),
        (with_parts(router={"kv_tokens": 1000}), "router.kv_tokens: the value 1000 is not allowed:"),
        (
            with_parts(router={"max_batch_tokens": 8, "max_sequences": 9}),
            "max_batch_tokens (8) is below max_sequences (9): each running sequence needs one token a step.",
        ),
        (with_parts(security={"key": "x"}), "security.key: unknown key; allowed here: admin_keys_env,"),
        (with_parts(security={"api_keys_env": "a b"}), "security.api_keys_env: the value 'a b' is not allowed:"),
        (
            with_parts(security={"api_keys_env": "KEYS", "api_keys_file": "keys"}),
            "`api_keys_file` and `api_keys_env` are both given; leave one of them out.",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence_naming_key_value_and_what_is_allowed(args, sentence):
    (line,) = errors_of(args)
    assert sentence in line
    assert line.endswith(".")


def test_every_error_is_reported_at_once():
    assert len(errors_of({"model": {}, "experts": {"groups": 0}, "router": {"replicas": -1}, "x": 1})) == 4


def test_a_long_value_is_not_repeated_in_full():
    (line,) = errors_of(with_parts(experts={"transport": "word " * 10_000}))
    assert len(line) < 300


def test_replicas_are_one_number_or_numbers_by_group():
    assert ExpertsSpec(replicas=2).replicas_of("experts-3") == 2
    by_group = ExpertsSpec(replicas={"experts-0": 3})
    assert [by_group.replicas_of(group) for group in by_group.group_names] == [3, 1, 1, 1]
    assert not by_group.elastic


def test_a_group_may_have_its_only_replicas_outside_the_default_pool():
    pools = {"h100": {"replicas": {"experts-0": 2}}}
    split = ExpertsSpec(groups=2, replicas={"experts-0": 0}, pools=pools)
    assert [split.replicas_of(group) for group in split.group_names] == [0, 1]
    assert [split.replicas_of(group, "h100") for group in split.group_names] == [2, 0]


def test_elastic_numbers_start_at_one():
    elastic = ExpertsSpec(replicas="elastic")
    assert elastic.elastic
    assert elastic.replicas_of("experts-3") == 1


def test_configuration_cannot_be_changed():
    config = AppConfig(model=ModelSpec(path="x"))
    with pytest.raises(ValueError, match="frozen"):
        config.model.path = "y"


def test_relative_paths_start_at_the_project_root(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(tmp_path))
    assert resolve("a/b") == tmp_path / "a" / "b"
    assert resolve("/a/b").parts == ("/", "a", "b")
    assert ModelSpec(path=".").served_name == tmp_path.name


def test_ray_options_leave_out_what_is_not_asked_for():
    assert ResourceSpec().ray_actor_options() == {"num_cpus": 0.1, "num_gpus": 0}
    asked = ResourceSpec(num_gpus=1, memory=7, accelerator_type="H100", label_selector={"a": "b"}, resources={"x": 1})
    assert asked.ray_actor_options() == {
        "num_cpus": 0.1,
        "num_gpus": 1,
        "memory": 7,
        "accelerator_type": "H100",
        "label_selector": {"a": "b"},
        "resources": {"x": 1},
    }


def test_a_deployment_is_named_after_its_group_and_pool():
    assert deployment_name("experts-0") == "experts-0"
    assert deployment_name("experts-0", "h100") == "experts-0-h100"
