"""What YAML leaves open is closed, and no text harms whoever reads it. About a second."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.policy_text import MAX_BYTES, MAX_VALUES, parse
from cluster.errors import ConfigError


def sentences_on(text: str | bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode() if isinstance(text, str) else text)
    return str(caught.value).splitlines()


def test_a_mapping_comes_out_as_it_was_written() -> None:
    assert parse(b"version: 1\npools: {a: {cost: 2.5}}\n") == {"version": 1, "pools": {"a": {"cost": 2.5}}}
    assert parse("\ufeffversion: 1".encode()) == {"version": 1}


def test_anchors_and_merges_are_yaml_and_stay_allowed() -> None:
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert parse(text.encode()) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}


def test_a_key_written_twice_is_named_with_its_value_and_where_the_first_is() -> None:
    assert sentences_on("version: 1\ngroups:\n- match: a\n  max_replicas: 5\n  max_replicas: 6\n") == [
        "groups.0.max_replicas: the value '6' is not allowed: the key stands in line 4 already; write it once."
    ]
    assert len(sentences_on("{version: 1, version: 1, pools: {a: {}, a: {}}, 'a': 2, a: 1}")) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("empty", "a mapping that begins with `version: 1`")),
        ("# nothing but this\n", ("empty", "a mapping")),
        ("- version: 1", ("[{'version': 1}]", "a mapping")),
        ("42", ("42", "a mapping")),
        ("version: 1\n---\nversion: 1", ("not valid YAML", "line 2")),
        ("version: [1", ("not valid YAML", "line 2", "']'")),
        ("version: 1\n\tx: 2", ("not valid YAML", "line 2")),
        ("version: !!python/object:os.system {}", ("not valid YAML", "line 1", "tag")),
        ("version: 2024-13-45", ("not valid YAML", "month")),
        ("version: !!bool maybe", ("not valid YAML",)),
        ("version: !!timestamp now", ("not valid YAML",)),
        ("? {a: b}\n: 1", ("not valid YAML",)),
        ("version: 1\0", ("not valid YAML",)),
        ("version: " + "9" * 5000, ("not valid YAML", "digits")),
        (b"version: \xff", ("UTF-8", "byte 9")),
        (b"version: 1\n#" + b"x" * MAX_BYTES, (str(MAX_BYTES),)),
    ],
)
def test_what_is_no_mapping_is_refused_in_one_sentence(text: str | bytes, words: tuple[str, ...]) -> None:
    (sentence,) = sentences_on(text)
    assert all(word in sentence for word in words), sentence
    assert "allowed:" in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "a:\n "])
def test_depth_is_bounded_before_anything_is_built(opening: str) -> None:
    # libyaml's composer would end the process: this test has killed its interpreter.
    text = opening * (500_000 // len(opening))
    if opening.startswith("a"):
        text = "".join(" " * depth + "a:\n" for depth in range(1400))
    (sentence,) = sentences_on(text)
    assert "20 levels" in sentence


def test_aliases_count_for_what_they_stand_for() -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    merges = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
    for text in (laughs, merges, "a: &a [*a]", "- *nobody"):
        assert len(sentences_on(text)) == 1
    assert str(MAX_VALUES) in sentences_on(laughs)[0]


@given(st.text(st.sampled_from("a: -[]{}&*!|>'\"\n\t#?%@0.~<"), max_size=60) | st.text(max_size=40))
def test_any_text_is_a_mapping_or_a_configuration_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(text.encode("utf-8", "surrogatepass")), dict)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_mapping_or_a_configuration_error(raw: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(raw), dict)
