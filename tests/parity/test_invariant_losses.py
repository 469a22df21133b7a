"""In bfloat16 with batch-invariant arithmetic a killed replica and another router change no bit of what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cluster.blueprint import make_blueprint
from deployments.generation import GenerationRequest
from tests.expert_pool import ExpertPool, view_of
from tests.models import save
from tests.parity.bits import request_of, resumed, talking
from tests.parity.split_model import config, prompts

TOKENS = 40
DELIVERED = 13


def requests() -> list[GenerationRequest]:
    """Half seeded, half greedy."""
    seeded = [request_of(number, prompt, TOKENS) for number, prompt in enumerate(prompts())]
    greedy = [replace(each, sampling=replace(each.sampling, temperature=0.0)) for each in seeded]
    return [*seeded[::2], *greedy[1::2]]


def test_a_kill_in_the_middle_and_a_resumption_elsewhere_change_no_bit(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path, torch.bfloat16)
    here = config(tmp_path, "bfloat16", transport="local", batch_invariant=True)
    asked = requests()
    with talking(here, make_blueprint(here), None) as talk:
        alone = talk.alone(asked)
    args = config(tmp_path, "bfloat16", groups=2, batch_invariant=True)
    blueprint = make_blueprint(args)
    with ExpertPool(4) as pool:
        view = view_of(pool.serve(blueprint, args.experts, batch_invariant=True))
        with talking(args, blueprint, view, routers=2) as talk:
            assert talk.together(asked, one_by_one=True, midway=lambda: pool.kill(2)) == alone
            # Whoever was on the first router goes on on the second one, and the other way round, in other company.
            moved = [number + 1 if number % 2 == 0 else number - 1 for number in range(len(asked))]
            rest = talk.together([resumed(asked[number], alone[number], DELIVERED) for number in moved])
    assert rest == [alone[number][DELIVERED:] for number in moved]
