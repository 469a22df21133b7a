"""How pydantic's findings become sentences; the configuration's own are in test_config. Well under a second."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from cluster.config import Spec
from cluster.sentences import MAX_SENTENCES, Fault, one_line, refuse, sentences, shown

TAGS = frozenset({"(one)", "(named)"})
Odd = Annotated[int, Field(gt=0, lt=10, multiple_of=3, strict=True)]
OneOrNamed = Annotated[
    Annotated[Odd, Tag("(one)")] | Annotated[dict[str, Odd], Tag("(named)")],
    Discriminator(lambda value: "(named)" if isinstance(value, dict) else "(one)"),
]


class Part(Spec):
    kind: Literal["a", "b"]
    size: Annotated[float, Field(ge=1)] | None = None
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            refuse([Fault("low", self.low, "it must be below high"), Fault("", self.high, "too low")])
        return self


class Whole(Spec):
    count: OneOrNamed | None = None
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = Field(default_factory=dict)
    need: Odd


def errors_of(document: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(document)
    return sentences(caught.value, Whole, name="whole", tags=TAGS)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"count": 10},
            "count: the value 10 is not allowed: Input should be greater than 0 and less than 10 and a multiple of 3.",
        ),
        (
            {"count": {"x": "y"}},
            "count.x: the value 'y' is not allowed: Input should be a valid integer greater than 0 and less than 10 "
            "and a multiple of 3.",
        ),
        ({"parts": [{}]}, "parts.0.kind: missing, and it has no default; allowed: 'a' or 'b'."),
        (
            {"parts": [{"kind": "a", "size": "x"}]},
            "parts.0.size: the value 'x' is not allowed: Input should be a valid number greater than or equal to 1.",
        ),
        ({"named": {"kind": {"kind": "a", "x": 1}}}, "named.kind.x: unknown key; allowed here: high, kind, low, size."),
        ({"named": {"(one)x": {"kind": "a", "x": 1}}}, "named.(one)x.x: unknown key; allowed here: high, kind, low,"),
        ({"x": 1}, "x: unknown key; allowed here: count, named, need, parts."),
    ],
)
def test_a_finding_is_a_sentence_with_the_whole_range(parts: dict[str, Any], sentence: str) -> None:
    (found,) = errors_of({"need": 3, **parts})
    assert sentence in found


def test_what_is_wrong_with_the_whole_is_told_under_its_name() -> None:
    assert errors_of(3) == ["whole: the value 3 is not allowed: Input should be a valid dictionary."]


def test_a_missing_number_is_told_its_range() -> None:
    (found,) = errors_of({})
    assert found.endswith("no default; allowed: greater than 0 and less than 10 and a multiple of 3.")


def test_each_fault_of_a_validator_is_told_under_its_own_key() -> None:
    assert errors_of({"need": 3, "parts": [{"kind": "a", "low": 5, "high": 4}]}) == [
        "parts.0.low: the value 5 is not allowed: it must be below high.",
        "parts.0: the value 4 is not allowed: too low.",
    ]


def test_the_first_errors_are_told_and_the_rest_counted() -> None:
    found = errors_of({"need": 3, **{f"x{index}": 1 for index in range(MAX_SENTENCES)}})
    assert len(found) == MAX_SENTENCES
    found = errors_of({"need": 3, **{f"x{index}": 1 for index in range(MAX_SENTENCES + 2)}})
    assert found[MAX_SENTENCES:] == ["whole: 2 more errors like these."]


def test_what_is_shown_of_a_value_is_short_whatever_it_is() -> None:
    deep: list[Any] = []
    for _ in range(60):
        deep = [deep, deep]
    for value in (deep, "x" * 100_000, 10**5000, {"a": deep}, object(), float("nan")):
        assert len(shown(value)) <= 120
    assert one_line("a\nb") == "'a\\nb'"
    assert one_line("experts-*") == "experts-*"
    assert one_line("") == "''"
