"""Rows of a replica that goes or dies are computed elsewhere: nobody loses a request, and the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.blueprint import make_blueprint
from tests.expert_pool import ExpertPool, view_of
from tests.models import save
from tests.parity.split_model import TOKENS, answers, config, greedy, near_ties, prompts
from tests.reference import continuations

Loss = Callable[[ExpertPool], None]


def one_drains(pool: ExpertPool) -> None:
    pool.drain(1)


def one_is_killed(pool: ExpertPool) -> None:
    pool.kill(2)


@pytest.mark.parametrize("loss", [one_drains, one_is_killed])
def test_losing_one_of_two_replicas_in_the_middle_of_a_batch_changes_nothing(loss: Loss, tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path, torch.float32)
    args = config(tmp_path, "float32", groups=2)
    blueprint = make_blueprint(args)
    requests = [greedy(number, prompt) for number, prompt in enumerate(prompts())]
    with ExpertPool(4) as pool:
        view = view_of(pool.serve(blueprint, args.experts))
        outputs = answers(args, blueprint, view, requests, midway=lambda: loss(pool))
    assert near_ties(continuations(tmp_path, torch.float32, prompts(), TOKENS), outputs) == 0
