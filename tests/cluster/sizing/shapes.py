"""The public configurations that the tests size, and made-up shapes for properties.

tests/sizing_models holds them as their makers publish them, DeepSeek-V3 without its `quantization_config`: only
dequantised weights are served.
"""

from pathlib import Path

from hypothesis import strategies as st

from cluster.sizing.gpus import GpuPool
from cluster.sizing.shape import Shape

MODELS = Path(__file__).resolve().parents[2] / "sizing_models"
PUBLISHED = {"deepseek-v2-lite": 15.7e9, "mixtral-8x7b": 46.7e9, "qwen3-235b-a22b": 235e9, "deepseek-v3": 671e9}
"""Weights in all, as their makers state them."""


def made_up(experts: dict[int, int], expert_numbers: int = 500, router_numbers: int = 4000, top_k: int = 2) -> Shape:
    """A float32 shape."""
    return Shape(
        model_type="made_up",
        dtype="float32",
        hidden=8,
        vocabulary=32,
        layers=len(experts),
        experts=experts,
        expert_numbers=dict.fromkeys(experts, expert_numbers),
        top_k=top_k,
        router_numbers=router_numbers,
        embedding_numbers=256,
        shared_numbers=0,
        kv_numbers=dict.fromkeys(experts, 8),
        expanded_numbers=0,
        widest=16,
        expert_widest=16,
        max_context=512,
    )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Up to 6 layers of up to 12 experts, the same number in each or not."""
    counts = draw(st.lists(st.integers(2, 12), min_size=1, max_size=6))
    if draw(st.booleans()):
        counts = [counts[0]] * len(counts)
    return made_up(dict(enumerate(counts)), expert_numbers=draw(st.integers(10, 2000)))


@st.composite
def fleets(draw: st.DrawFn, most_gpus: int = 8) -> tuple[GpuPool, ...]:
    """One to three kinds; bandwidths known or not."""
    kinds = draw(st.integers(1, 3))
    return tuple(
        GpuPool(
            name,
            draw(st.integers(1, most_gpus)),
            draw(st.integers(20_000, 400_000)),
            draw(st.none() | st.integers(10**6, 10**8)),
        )
        for name in ("small", "large", "other")[:kinds]
    )
