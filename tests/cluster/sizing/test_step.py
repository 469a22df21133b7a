"""Bytes on the network are those of the frames; times add up from bytes and from what was measured."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fabric.frames import Kind, encode
from cluster.placement import contiguous
from cluster.sizing import measured
from cluster.sizing.shape import read_shape
from cluster.sizing.step import COUNT_BYTES, Reading, named_share, step_time, traffic
from tests.cluster.sizing.shapes import MODELS, made_up

BENCH = Path(__file__).resolve().parents[3] / "infra" / "bench" / "README.md"


def test_a_token_of_deepseek_v3_takes_229376_bytes_a_layer():
    rows = traffic(read_shape(MODELS / "deepseek-v3"))
    assert rows.out_bytes == rows.back_bytes == 8 * 7168 * 2
    assert rows.token_layer_bytes == 229_376


def test_bytes_are_those_of_the_frames():
    """Three tokens, two experts each, all in one group of four."""
    shape = made_up({0: 4}, top_k=2)
    rows = torch.zeros(3 * shape.top_k, shape.hidden)
    asked = encode(Kind.ROWS, counts=np.array([6, 0, 0, 0]), body=rows)
    answered = encode(Kind.RESULT, body=rows)
    sent = sum(len(buffer) for frame in (asked, answered) for buffer in frame)
    assert sent == 3 * traffic(shape).token_layer_bytes + traffic(shape).batch_bytes + 4 * COUNT_BYTES


def test_the_more_sequences_the_more_experts_are_named():
    shape = read_shape(MODELS / "deepseek-v3")
    shares = [named_share(shape, 3, count) for count in (1, 8, 32, 10**6)]
    assert shares[0] == pytest.approx(8 / 256)
    assert shares[2] == pytest.approx(0.64, abs=0.01)
    assert all(less < more for less, more in pairwise(shares))
    assert shares[-1] == pytest.approx(1)


def step(shape, reading, groups=2, sequences=1, context_tokens=0, link=1e12):
    placed = contiguous(shape.experts, groups).groups
    return step_time(shape, placed, reading, sequences=sequences, context_tokens=context_tokens, link=link)


def test_a_router_reads_its_weights_but_the_embedding_and_its_context():
    shape = made_up({0: 4, 1: 4})
    found = step(shape, Reading(1000.0, (1e9, 1e9)), sequences=3, context_tokens=10)
    assert found.router_s == pytest.approx((4 * (4000 - 256) + 3 * 10 * 2 * 8 * 4) / 1000)


def test_the_slowest_group_counts_in_every_layer():
    shape = made_up({0: 4, 1: 4}, expert_numbers=500)
    all_named = step(shape, Reading(1e9, (2000.0, 1000.0)), sequences=100)
    assert all_named.experts_s == pytest.approx(2 * 2 * 500 * 4 / 1000)
    assert step(shape, Reading(1e9, (2000.0, 1000.0))).experts_s == pytest.approx(2 * 500 * 4 / 1000), "one each"


def test_the_parts_add_up():
    found = step(made_up({0: 4}), Reading(1e6, (1e6, 1e6)), sequences=4, link=1e6)
    parts = (found.router_s, found.experts_s, found.network_s, found.hops_s)
    assert found.total_s == pytest.approx(sum(parts))
    assert found.tokens_per_s == pytest.approx(4 / found.total_s)


def test_measured_figures_are_those_of_the_benchmarks():
    text = BENCH.read_text()
    scatter = re.search(r"\| T=8 H=256 \| whole scatter \+ gather \| (\d+) us", text)
    growth = re.search(r"\| demo, 8 sequences \| one more of groups, from 4 to 8 \| ([\d.]+) ms", text)
    assert pytest.approx(float(scatter[1]) * 1e-6) == measured.SCATTER_S
    assert pytest.approx(float(growth[1]) * 1e-3) == measured.GROUP_STEP_S


def test_hops_begin_with_what_was_measured_and_grow_by_the_group():
    assert measured.hop_s(2) == measured.hop_s(4) == measured.SCATTER_S
    assert measured.hop_s(8) - measured.hop_s(4) == pytest.approx(0.136e-3)
