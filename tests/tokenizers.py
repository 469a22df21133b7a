"""Small tokenizers for tests, built in milliseconds: byte-level BPE with a chat template, and SentencePiece's kind.

Knows nothing of ExpertScale. Nothing is read from disk.
"""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The quick brown fox jumps over the lazy dog. def main(): return 42\n",
    "专家混合模型把每一个词交给少数几个专家。你好，世界！",
    "naïve café, e\u0301 combining, 👩‍👩‍👧‍👦 family, 🇨🇳 flag, 🎉 party\n",
)
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
# Accepts system first only, then user and assistant in turn; knows neither developer nor tool.
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("unknown role " ~ message['role']) -}}
{%- endif -%}
{%- if message['role'] == 'system' and not loop.first -%}
{{- raise_exception('the system message must come first') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


@cache
def byte_level(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Byte-level BPE: every byte is a token, so a character may be spread over several. "</s>" has id 1."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(CORPUS, trainer)
    return _wrap(core, chat_template)


@cache
def sentencepiece_like() -> Any:
    """BPE with byte fallback and "▁" for spaces, Llama's kind: decoding drops the space before the first word."""
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("q", "u"), ("▁", "f"), ("o", "x"), ("▁f", "ox")]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_lowercase]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", *SPECIAL)])
    return _wrap(core, None)


def _wrap(core: Tokenizer, chat_template: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer
