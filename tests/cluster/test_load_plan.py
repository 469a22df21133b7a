"""The load plan as data: round trip, digest, addressing. Takes under a second."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError
from cluster.load_plan import (
    EXPERT,
    FfnSpec,
    LayerPlan,
    LoadPlan,
    Operation,
    Recipe,
    ShardFile,
    Source,
    model_digest,
)
from cluster.placement import contiguous

names = st.text(min_size=1, max_size=12)
counts = st.integers(0, 1 << 40)
positive = st.floats(min_value=0.001, max_value=1e6)
specs = st.builds(
    FfnSpec,
    gated=st.booleans(),
    interleaved=st.booleans(),
    transposed=st.booleans(),
    bias=st.booleans(),
    activation=names,
    alpha=positive,
    limit=st.none() | positive,
    limit_after=st.booleans(),
    up_offset=positive,
    upcast=st.booleans(),
    fallback=st.none() | names,
)
sources = st.builds(Source, key=names, fused=st.booleans(), files=st.lists(counts, max_size=3).map(tuple))
operations = st.builds(
    Operation, name=st.sampled_from(["concatenate", "transpose"]), dims=st.lists(counts, max_size=2).map(tuple)
)
recipes = st.builds(
    Recipe,
    shape=st.lists(counts, max_size=2).map(tuple),
    sources=st.lists(sources, max_size=2).map(tuple),
    operations=st.lists(operations, max_size=2).map(tuple),
)
layer_plans = st.builds(
    LayerPlan,
    layer=counts,
    module=names,
    num_experts=counts,
    hidden=counts,
    spec=specs,
    parameters=st.dictionaries(names, recipes, max_size=2),
)
plans = st.builds(
    LoadPlan,
    model_type=names,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    layers=st.dictionaries(counts, layer_plans, max_size=2),
    files=st.lists(st.builds(ShardFile, name=names, size_bytes=counts), max_size=2).map(tuple),
    max_context=counts,
    context_reason=st.none() | names,
    fingerprint=st.text("0123456789abcdef", max_size=64),
)


def a_plan(experts: int = 4) -> LoadPlan:
    """One layer of two-projection experts, one tensor each."""
    up = Recipe((6, 2), (Source(f"layers.1.experts.{EXPERT}.up", False, (0,) * experts),), ())
    down = Recipe((2, 3), (Source("layers.1.experts.down", True, (0,)),), (Operation("transpose", (0, 1)),))
    layer = LayerPlan(1, "layers.1.experts", experts, 2, FfnSpec(), {"gate_up_proj": up, "down_proj": down})
    return LoadPlan("tiny", "float32", {1: layer}, (ShardFile("model.safetensors", 100),), 16, None, "ab" * 32)


@settings(max_examples=50, deadline=None)
@given(plans)
def test_a_plan_survives_the_trip_through_json(plan: LoadPlan) -> None:
    text = plan.to_json()
    assert LoadPlan.from_json(text) == plan
    assert LoadPlan.from_json(text).to_json() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', json.dumps({"model_type": "x", "extra": 1})])
def test_other_text_is_refused_as_no_load_plan(text: str) -> None:
    with pytest.raises(CheckpointError, match="not a load plan"):
        LoadPlan.from_json(text)


def test_a_plan_with_an_unknown_key_is_refused() -> None:
    data = json.loads(a_plan().to_json())
    with pytest.raises(CheckpointError, match="surprise"):
        LoadPlan.from_json(json.dumps({**data, "surprise": 1}))


def test_a_source_finds_the_tensor_of_an_expert() -> None:
    assert Source(f"a.{EXPERT}.w", False, (0, 0, 1)).locate(2) == ("a.2.w", 1)
    assert Source("a.w", True, (3,)).locate(2) == ("a.w", 3)


def test_biased_experts_have_four_parameters_and_ungated_ones_no_gate() -> None:
    assert FfnSpec(bias=True).parameter_names == (
        "gate_up_proj",
        "down_proj",
        "gate_up_proj_bias",
        "down_proj_bias",
    )
    assert FfnSpec(gated=False).parameter_names == ("up_proj", "down_proj")


def test_the_fingerprint_covers_plan_and_content_and_does_not_depend_on_an_earlier_one() -> None:
    plan = a_plan()
    first = plan.with_fingerprint().fingerprint
    assert first == replace(plan, fingerprint="").with_fingerprint().fingerprint
    other = tuple(replace(file, content="ef" * 32) for file in plan.files)
    assert first != replace(plan, files=other).with_fingerprint().fingerprint
    assert first != replace(plan, config="ef" * 32).with_fingerprint().fingerprint
    assert first != replace(plan, dtype="bfloat16").with_fingerprint().fingerprint


def test_the_digest_changes_with_weights_placement_arithmetic_and_wire() -> None:
    plan = a_plan()
    placement = contiguous(plan.experts_per_layer, 2)
    digest = model_digest(plan, placement, dtype="float32", wire_version=1)
    assert len(digest) == 32
    assert digest == model_digest(plan, placement, dtype="float32", wire_version=1)
    others = [
        model_digest(replace(plan, fingerprint="cd" * 32), placement, dtype="float32", wire_version=1),
        model_digest(plan, contiguous(plan.experts_per_layer, 3), dtype="float32", wire_version=1),
        model_digest(plan, placement, dtype="bfloat16", wire_version=1),
        model_digest(plan, placement, dtype="float32", wire_version=2),
    ]
    assert len({digest, *others}) == 5
