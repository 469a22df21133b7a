"""Tokens from logits: equal to transformers' processors where it has some, else to the formulas. About 4 s."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.errors import EngineError
from deployments.router.noise import draw, noise_key
from deployments.router.sampler import Sampled, filter_scores, sample
from deployments.router.sequence import Sequence
from tests.deployments.router.fake_backbone import make_request

VOCAB = 40


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sequence_of(prompt: list[int], output: list[int] | None = None, choice: int = 0, **sampling: object) -> Sequence:
    request = make_request(prompt, choice=choice, **sampling)
    return Sequence(request, choice, 0, 1000, tokens=prompt + (output or []))


def token(outcome: Sampled | EngineError) -> int:
    assert isinstance(outcome, Sampled)
    return outcome.token


def sample_one(logits: Tensor, sequence: Sequence) -> Sampled:
    [outcome] = sample(logits, [sequence])
    assert isinstance(outcome, Sampled)
    return outcome


def test_greedy_rows_take_their_maximum() -> None:
    logits = logits_of(5)
    assert [token(o) for o in sample(logits, [sequence_of([1])] * 5)] == logits.argmax(-1).tolist()


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = logits_of(1)
    assert sample_one(logits, sequence_of([1], temperature=1e-9)).token == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_filters_keep_what_transformers_keeps_in_its_order(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(4)
    chain = LogitsProcessorList()
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    reference = chain(torch.zeros(4, 1, dtype=torch.long), logits)
    assert filter_scores(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).equal(reference)
    keys = torch.tensor([noise_key(3, 0, 2)] * 4)
    rows = [
        sequence_of([1], [4, 4], seed=3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for _ in range(4)
    ]
    assert [token(o) for o in sample(logits, rows)] == draw(reference.softmax(-1), keys).tolist()


def test_the_order_of_processors_is_that_of_generate() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=VOCAB, n_positions=8))
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        sequence_bias={(3,): 2.0},
    )
    chain = model._get_logits_processor(config, input_ids_seq_length=1, logits_processor=LogitsProcessorList())
    assert [type(processor) for processor in chain] == [
        SequenceBiasLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
    ]
    logits, history = logits_of(1), [3, 9, 9, 12]
    reference = chain(torch.tensor([history]), logits.clone()).softmax(-1)
    sampling = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    for seed in range(50):
        ours = sample_one(logits, sequence_of([3, 9], [9, 12], seed=seed, logit_bias={3: 2.0}, **sampling))
        assert ours.token == int(draw(reference, torch.tensor([noise_key(seed, 0, 2)])))


def test_the_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([4.0, 3.9, 3.8, -1.0])
    assert sample_one(logits, sequence_of([0], [1], repetition_penalty=1.2)).token == 2


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([4.0, 3.5, 3.2])
    assert sample_one(logits, sequence_of([0, 0], presence_penalty=2.0, frequency_penalty=2.0)).token == 0
    assert sample_one(logits, sequence_of([5], [0], presence_penalty=0.4)).token == 0
    assert sample_one(logits, sequence_of([5], [0], presence_penalty=0.6)).token == 1
    assert sample_one(logits, sequence_of([5], [0, 0], presence_penalty=0.6)).token == 1
    assert sample_one(logits, sequence_of([5], [0, 0, 1], frequency_penalty=0.5)).token == 2
    assert sample_one(logits, sequence_of([5], [0], presence_penalty=-1.0)).token == 0


def test_logit_bias_forces_and_forbids_tokens() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    assert sample_one(logits, sequence_of([1], logit_bias={7: 100.0})).token == 7
    assert sample_one(logits, sequence_of([1], logit_bias={best: -100.0})).token == logits[0].topk(2).indices[1]


def test_processing_one_row_leaves_the_given_logits_and_other_rows_alone() -> None:
    logits = logits_of(2)
    before = logits.clone()
    outcomes = sample(logits, [sequence_of([1], logit_bias={7: 100.0}), sequence_of([1])])
    assert [token(o) for o in outcomes] == [7, int(before[1].argmax())]
    assert logits.equal(before)


def test_logprobs_are_those_of_the_raw_model_distribution() -> None:
    logits = logits_of(1)
    sequence = sequence_of([1], logit_bias={7: 100.0}, temperature=0.3, top_k=2, logprobs=3)
    outcome = sample_one(logits, sequence)
    reference = torch.log_softmax(logits[0], -1)
    assert outcome.logprob is not None
    assert (outcome.token, outcome.logprob.token) == (7, 7)
    assert outcome.logprob.logprob == pytest.approx(float(reference[7]))
    assert [t for t, _ in outcome.logprob.top] == reference.topk(3).indices.tolist()
    assert [p for _, p in outcome.logprob.top] == pytest.approx(reference.topk(3).values.tolist())


def test_logprobs_without_alternatives_and_none_at_all() -> None:
    logits = logits_of(1)
    none = sample_one(logits, sequence_of([1]))
    bare = sample_one(logits, sequence_of([1], logprobs=0))
    assert none.logprob is None
    assert bare.logprob is not None
    assert bare.logprob.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_fails_alone(bad: float) -> None:
    logits = logits_of(3)
    logits[1, 5] = bad
    rows = [sequence_of([1]), sequence_of([1], temperature=1.0, logprobs=1), sequence_of([1], temperature=1.0)]
    outcomes = sample(logits, rows)
    assert isinstance(outcomes[1], EngineError)
    assert token(outcomes[0]) == int(logits[0].argmax())
    assert token(outcomes[2]) == token(sample(logits[2:], rows[2:])[0])


def test_a_row_of_impossible_tokens_only_is_broken_but_some_are_fine() -> None:
    logits = logits_of(2)
    logits[0] = -math.inf
    logits[1, 1:] = -math.inf
    outcomes = sample(logits, [sequence_of([1], temperature=1.0)] * 2)
    assert isinstance(outcomes[0], EngineError)
    assert token(outcomes[1]) == 0


def test_the_token_of_a_row_does_not_depend_on_its_neighbours() -> None:
    options: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 1.0},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {3: 5.0}},
        {"temperature": 1.2, "top_k": 7, "repetition_penalty": 1.3},
    ]
    rows = [sequence_of([1, 2], [i % 5] * (i % 4), seed=i, **options[i % 6]) for i in range(60)]
    logits = logits_of(60, seed=5)
    together = [token(o) for o in sample(logits, rows)]
    assert together == [token(sample(logits[i : i + 1], rows[i : i + 1])[0]) for i in range(60)]


def test_choices_and_positions_draw_differently_and_resumes_alike() -> None:
    logits = torch.zeros(1, VOCAB)
    drawn = {sample_one(logits, sequence_of([1], choice=c, seed=5, temperature=1.0)).token for c in range(20)}
    assert len(drawn) > 5
    fresh = sequence_of([1], [4, 5], seed=5, temperature=1.0)
    resumed = Sequence(make_request([1, 4, 5], prompt_tokens=1, seed=5, temperature=1.0), 0, 0, 9, tokens=[1, 4, 5])
    assert sample_one(logits, fresh) == sample_one(logits, resumed)


def test_sampled_tokens_follow_the_filtered_distribution() -> None:
    logits = logits_of(1, seed=9)
    options = {"temperature": 1.5, "top_k": 12, "top_p": 0.95}
    expected = filter_scores(logits, min_p=0.0, **options)[0].softmax(-1).double()  # type: ignore[arg-type]
    count = 4000
    rows = [sequence_of([1], seed=seed, **options) for seed in range(count)]
    counts = torch.tensor([token(o) for o in sample(logits.expand(count, VOCAB), rows)]).bincount(minlength=VOCAB)
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    freedom = int(kept.sum()) - 1
    chi_square = float(((counts[kept] - count * expected[kept]) ** 2 / (count * expected[kept])).sum())
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)
