"""Text to tokens and tokens to text: the checkpoint's own tokenizer and chat template.

Knows what a role and a token are; no HTTP and no model. Reads local files only and never runs code from a checkpoint
(chat templates run in transformers' Jinja sandbox). Imports transformers' tokenizers, none of its models.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cluster.errors import CheckpointError, RequestError

log = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, str]]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_PROBE = "probe-5eb1c0de"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ChatTokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads.

    special_ids: ids that `decode` leaves out. roles: those the chat template shows; empty without a template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.roles = frozenset(role for role in _ROLES if self._shows(role)) if tokenizer.chat_template else frozenset()
        if tokenizer.chat_template and not self.roles:
            log.warning("the chat template shows no message of any role; every chat will be refused")
        self._added: dict[int, str] = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._byte_level = "ByteLevel" in decoder
        self._spaced = any(name in decoder for name in ("ByteFallback", "Metaspace", "▁"))
        self._longest_bytes = self._longest_piece_bytes() if self._byte_level else None

    @classmethod
    def load(cls, path: Path) -> ChatTokenizer:
        """Raises CheckpointError where the folder holds no usable tokenizer."""
        try:
            return cls(AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"The tokenizer in {path} cannot be loaded: {reason}") from error

    def chat_text(self, messages: Conversation) -> str:
        """The conversation as the model reads it, up to where the assistant's answer begins.

        messages: role, content and optionally name and tool_call_id, in order. "developer" is OpenAI's newer word
        for "system" and becomes that where the template does not know it.

        Raises:
            RequestError: naming the first message the template rejects or leaves out.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("This model has no chat template; use /v1/completions.", "messages", "no_chat_template")
        renamed = [dict(item) for item in messages]
        for i, message in enumerate(renamed):
            if message["role"] == "developer" and "developer" not in self.roles:
                message["role"] = "system"
            if message["role"] not in self.roles:
                reason = f"this model's chat template has no role '{messages[i]['role']}'"
                raise RequestError(f"'messages[{i}].role': {reason}.", f"messages[{i}].role", "invalid_value")
        try:
            return self._render(renamed)
        except Exception as error:  # a template is a program of its own, with every error a program can have
            i = self._culprit(renamed)
            reason = f"The chat template rejects messages[{i}] (role '{messages[i]['role']}')"
            # Not what the template says of it, which may quote the message: that is for the client alone.
            log.info("%s", reason)
            told = f"{reason}: {str(error)[:300].rstrip('.')}."
            raise RequestError(told, f"messages[{i}].role", "invalid_value") from None

    def text_tokens(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`, with the tokenizer's own beginning-of-text token unless `special` is False."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special, verbose=False)
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens, without tokenising; 0 where there is none."""
        return len(text.encode()) // self._longest_bytes if self._longest_bytes else 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; no clean-up of spaces, which would change earlier text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text, as bytes: it may be part of a character."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if self._spaced:
            match = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()
        return self.decode([token]).encode()

    def _render(self, conversation: Conversation) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in conversation], tokenize=False, add_generation_prompt=True
        )
        return text

    def _shows(self, role: str) -> bool:
        """Does the template show what `role` says, in any of the places it could stand in a conversation?"""
        message = {"role": role, "content": _PROBE}
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        for before, after in (([], []), ([], [user]), ([user], []), ([user], [user]), ([user, assistant], [])):
            try:
                if _PROBE in self._render([*before, message, *after]):
                    return True
            except Exception:  # it may accept the next order
                continue
        return False

    def _culprit(self, conversation: Conversation) -> int:
        """Index of a message that the template rejects after accepting everything before it, by bisection."""
        accepted, rejected = 0, len(conversation)
        while rejected - accepted > 1:
            middle = (accepted + rejected) // 2
            try:
                self._render(conversation[:middle])
                accepted = middle
            except Exception:
                rejected = middle
        return rejected - 1

    def _longest_piece_bytes(self) -> int:
        """Bytes of the longest token, three times that where text is normalised (composing shortens it)."""
        longest = max((len(piece) for piece in self._tokenizer.get_vocab()), default=1)
        return longest * (1 if self._tokenizer.backend_tokenizer.normalizer is None else 3)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table of byte-level BPE: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
