"""What all end-to-end modules share: the whole demo model in this process, as the reference of every answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving import ROOT

CHECKPOINT = ROOT / "infra" / "demo-model" / "checkpoint"
MODEL = "expertscale-demo"


class WholeModel:
    """transformers' own answers, greedy, in fp32."""

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def chat(self, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
        """The assistant's text."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return self._continue(list(ids), max_tokens)

    def complete(self, text: str, max_tokens: int) -> str:
        """The text that follows `text`."""
        return self._continue(self.tokenizer(text)["input_ids"], max_tokens)

    def continued(self, text: str, tokens: int) -> str:
        """Exactly so many tokens after `text`, ends of sequence among them ignored."""
        ids = self.tokenizer(text)["input_ids"]
        return self._continue(ids, tokens, ends=False)

    @torch.no_grad()
    def _continue(self, ids: list[int], max_tokens: int, *, ends: bool = True) -> str:
        prompt = torch.tensor([ids])
        config = copy.deepcopy(self.model.generation_config)
        if not ends:
            config.eos_token_id = None
        output: Any = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            generation_config=config,
        )
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


@pytest.fixture(scope="session")
def whole_model() -> WholeModel:
    return WholeModel()
