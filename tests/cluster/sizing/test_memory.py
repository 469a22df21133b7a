"""What a step needs beside weights and pool, measured by torch's profiler on the CPU, stays below the estimate."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cluster.checkpoint import compile_plan
from cluster.sizing.memory import Work, router_memory
from cluster.sizing.shape import read_shape
from deployments.router.backbone import load_backbone
from deployments.router.step import SequenceSlice, StepInput
from tests import models

PAGE = 16
WORK = Work(batch_tokens=128, sequences=16, kv_tokens=4096)
WIDE = {
    "hidden_size": 128,
    "vocab_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def peak_bytes(run) -> int:
    """The most memory that was allocated and not freed again at any time while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        held += each.nbytes()
        most = max(most, held)
    return most


def prefill() -> StepInput:
    """The last chunk of a prompt that fills the pool."""
    count = WORK.batch_tokens
    pages = list(range(WORK.kv_tokens // PAGE))
    positions = range(WORK.kv_tokens - count, WORK.kv_tokens)
    return StepInput([5] * count, positions, [SequenceSlice(0, count, WORK.kv_tokens, pages)], [count - 1])


def decode() -> StepInput:
    """As many sequences as allowed, which fill the pool together."""
    each = WORK.kv_tokens // WORK.sequences
    pages = each // PAGE
    slices = [SequenceSlice(row, 1, each, list(range(row * pages, (row + 1) * pages))) for row in range(WORK.sequences)]
    return StepInput([5] * WORK.sequences, [each - 1] * WORK.sequences, slices, range(WORK.sequences))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_a_step_needs_no_more_than_is_estimated(model_type, tmp_path, record_property):
    # With latents this wide a long chunk expands them, as DeepSeek's does.
    latents = {"kv_lora_rank": 256} if model_type == "deepseek_v3" else {}
    folder = models.save(model_type, tmp_path, **WIDE, **latents)
    backbone = load_backbone(
        folder,
        compile_plan(folder),
        dtype=torch.float32,
        device="cpu",
        moe=lambda _layer, hidden, index, _weight: _rows(hidden, index),
        kv_tokens=WORK.kv_tokens,
    )
    estimated = router_memory(read_shape(folder, "float32"), WORK).step_bytes
    measured = max(peak_bytes(lambda step=step: backbone.forward(step)) for step in (prefill(), decode()))
    record_property(f"{model_type} step memory, measured / estimated", round(measured / estimated, 2))
    assert estimated / 10 < measured <= estimated


def _rows(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As the dispatcher does: a row for each (token, expert) pair comes back, and they are summed."""
    return hidden[:, None].expand(-1, index.shape[1], -1).clone().sum(1)
