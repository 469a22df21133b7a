"""Documents to token streams: the byte-level BPE tokenizer, its chat template, and chat-formatted samples.

Training reads two streams for each domain: `text` (<s> document </s> ...) and `chat` (short exchanges cut from the same
documents). Documents are held out for evaluation as wholes. It knows no packages and no model.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]

# One turn is <|role|>content, closed by </s> after the assistant's, which is where generation stops.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("role must be 'system', 'user' or 'assistant', got '" ~ message['role'] ~ "'") -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

_SYSTEM_PROMPTS = {
    "python": "You are a helpful assistant.",
    "english": "You are a helpful assistant.",
    "chinese": "你是一个有用的助手。",
}
_FUNCTION = re.compile(r"^def (\w+)\(.*(?:\n(?:[ \t].*)?)*", re.M)
_MAX_ANSWER_CHARS = {"python": 700, "english": 700, "chinese": 300}


class Streams(NamedTuple):
    """Token ids of one domain, each int64 [N]."""

    text: Tensor
    chat: Tensor
    held_out: Tensor


def train_tokenizer(documents: dict[str, list[str]], chars_per_domain: int = 2_000_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that has seen the same number of characters of each domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = (text for texts in documents.values() for text in _take(texts, chars_per_domain))
    tokenizer.train_from_iterator(samples, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=SPECIAL_TOKENS[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def domain_streams(domain: str, texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Streams:
    """Every twentieth document (by checksum, so that it does not move when others come or go) is held out."""
    held = [text for text in texts if zlib.crc32(text[:400].encode()) % 20 == 0]
    kept = [text for text in texts if zlib.crc32(text[:400].encode()) % 20 != 0]
    random.Random(seed).shuffle(kept)
    exchanges = list(chat_exchanges(domain, kept, random.Random(seed)))
    return Streams(*(_encode(tokenizer, part) for part in (_as_documents(kept), exchanges, _as_documents(held))))


def chat_exchanges(domain: str, texts: list[str], rng: random.Random) -> Iterator[str]:
    """Rendered exchanges whose answer is text of the domain, in random order."""
    pairs_of = _code_pairs if domain == "python" else partial(_prose_pairs, domain)
    pairs = [pair for text in texts for pair in pairs_of(text)]
    rng.shuffle(pairs)
    for question, answer in pairs:
        system = f"<|system|>{_SYSTEM_PROMPTS[domain]}" if rng.random() < 0.15 else ""
        yield f"{BOS}{system}<|user|>{question}<|assistant|>{answer}{EOS}"


def _code_pairs(text: str) -> Iterator[tuple[str, str]]:
    for match in _FUNCTION.finditer(text):
        body, name = match.group(0).rstrip(), match.group(1)
        if not 60 <= len(body) <= _MAX_ANSWER_CHARS["python"]:
            continue
        signature, _, rest = body.partition("\n")
        doc = re.search(r'"""(.+?)[.\n"]', rest)
        wanted = doc.group(1).strip() if doc else name.replace("_", " ").strip()
        yield f"Write python: {wanted}", body
        yield f"Continue: {signature}", rest


def _prose_pairs(domain: str, text: str) -> Iterator[tuple[str, str]]:
    paragraphs = text.split("\n\n")
    chinese = domain == "chinese"
    limit = _MAX_ANSWER_CHARS[domain]
    title = next((p for p in paragraphs[:3] if " - " in p and len(p) < 200), None)
    prose = [p for p in paragraphs if 80 // (2 if chinese else 1) <= len(p) <= limit]
    if title and prose:
        name = title.split(" - ")[0].split(",")[0]
        yield (f"{name} 是什么？" if chinese else f"What is {name}?"), f"{title}\n\n{prose[0]}"
    for paragraph in prose:
        first, stop, rest = paragraph.partition("。" if chinese else ". ")
        if stop and len(rest) > 20 and len(first) < 120:
            yield (f"继续：{first}。" if chinese else f"Continue: {first}."), rest


def _as_documents(texts: Iterable[str]) -> list[str]:
    return [f"{BOS}{text}\n{EOS}" for text in texts]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for item in encoded for token in item.ids])


def _take(texts: list[str], chars: int) -> Iterator[str]:
    """Pieces of the texts, in a fixed shuffled order, until `chars` characters have been handed out."""
    for text in random.Random(0).sample(texts, len(texts)):
        if chars <= 0:
            return
        yield text[:chars]
        chars -= len(text)
