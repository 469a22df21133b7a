"""The whole model in one child process, by transformers alone: what the split model is measured against.

Greedy `generate` with `grouped_mm` experts in float32. Callers try it with every number of THREADS and take the best:
the reference need not keep to what threads.env says to the servers. Between calls the child waits on a pipe and
uses no CPU. Prompts are random token ids, so that no routing is favoured.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

ANSWER_S = 120.0
THREADS = (1, 2)

Prompts = Sequence[Sequence[int]]


def random_prompts(count: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids each, special ones left out; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(6, vocab_size, (count, tokens), generator=generator).tolist()
    return prompts


class WholeModel:
    """The child process with the checkpoint in `folder`; a context manager.

    parameter_bytes: of all weights.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, folder), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.parameter_bytes = int(self._answer())
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> WholeModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def generate_s(self, prompts: Prompts, new_tokens: int, threads: int) -> float:
        """Seconds of one greedy `generate` over all prompts (of equal length), `new_tokens` each."""
        return float(self._ask("generate", prompts, new_tokens, threads))

    def prefill_s(self, prompts: Prompts, batch: int, threads: int) -> list[float]:
        """Seconds from the start to the end of each prompt's prefill, `batch` prompts (of equal length) at a time.

        A prefill is one forward pass that gives the logits of the last position and keeps keys and values.
        """
        ends: list[float] = self._ask("prefill", prompts, batch, threads)
        return ends

    def _ask(self, what: str, *arguments: Any) -> Any:
        self._pipe.send((what, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"the whole model's process does not answer within {ANSWER_S:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def _stop(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
        model.eval()
        model.generation_config.eos_token_id = None  # as `ignore_eos` does: every answer has its full length
        pipe.send(sum(parameter.nbytes for parameter in model.parameters()))
    except Exception:
        pipe.send(traceback.format_exc())
        return
    works = {"generate": _generate, "prefill": _prefill}
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(works[what](model, *arguments))
        except Exception:
            pipe.send(traceback.format_exc())


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: Prompts, new_tokens: int, threads: int) -> float:
    torch.set_num_threads(threads)
    ids = torch.tensor(prompts)
    started_at = time.perf_counter()
    # `Any`: transformers mixes `generate` in where mypy does not see it.
    whole: Any = model
    result = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    took_s = time.perf_counter() - started_at
    if result.shape != (len(prompts), ids.shape[1] + new_tokens):
        raise RuntimeError(f"generate gave {tuple(result.shape)}, not {new_tokens} tokens for each of {len(prompts)}")
    return took_s


@torch.inference_mode()
def _prefill(model: PreTrainedModel, prompts: Prompts, batch: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    ends: list[float] = []
    started_at = time.perf_counter()
    for first in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[first : first + batch])
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        ends += [time.perf_counter() - started_at] * len(ids)
    return ends
