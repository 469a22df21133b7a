"""Chat templates, roles and token bytes of a checkpoint's tokenizer (1 s)."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CheckpointError, RequestError
from deployments.ingress.chat import ChatTokenizer
from tests.tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece_like

TOKENIZER = ChatTokenizer(byte_level())
TEXT = "The fox 你好 👩‍👩‍👧‍👦"


def message(role: str, content: str = "hi") -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_saved_tokenizer_loads_with_its_template(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    loaded = ChatTokenizer.load(tmp_path)
    assert loaded.roles == {"system", "user", "assistant"}
    assert loaded.chat_text([message("user", TEXT)]) == TOKENIZER.chat_text([message("user", TEXT)])
    assert loaded.text_tokens(TEXT) == TOKENIZER.text_tokens(TEXT)


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ChatTokenizer.load(tmp_path)


def test_the_first_message_the_template_rejects_is_named() -> None:
    conversation = [message("user"), message("assistant")] * 10
    conversation[7] = message("system")
    with pytest.raises(RequestError, match="must come first") as caught:
        TOKENIZER.chat_text(conversation)
    assert caught.value.param == "messages[7].role"


def test_a_role_the_template_would_leave_out_silently_is_refused() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = ChatTokenizer(byte_level(template))
    assert tokenizer.roles == {"user"}
    with pytest.raises(RequestError) as caught:
        tokenizer.chat_text([message("user"), message("assistant")])
    assert caught.value.param == "messages[1].role"


def test_a_template_that_knows_developer_keeps_it() -> None:
    tokenizer = ChatTokenizer(byte_level("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"))
    assert tokenizer.chat_text([message("developer"), message("tool")]) == "[developer]hi[tool]hi"


def test_a_model_without_a_template_points_to_completions() -> None:
    with pytest.raises(RequestError, match="/v1/completions"):
        ChatTokenizer(byte_level(None)).chat_text([message("user")])


def test_a_template_cannot_reach_python() -> None:
    """Without the sandbox the first expression lists every class of the process."""
    escape = "{% for m in messages %}{{ m.content }}{% endfor %}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="has no role 'user'"):
        ChatTokenizer(byte_level(escape + CHAT_TEMPLATE)).chat_text([message("user")])


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ChatTokenizer(sentencepiece_like())], ids=["bytes", "pieces"])
def test_bytes_of_the_tokens_join_to_the_text(tokenizer: ChatTokenizer) -> None:
    text = TEXT.lower()
    joined = b"".join(tokenizer.token_bytes(token) for token in tokenizer.text_tokens(text)).decode()
    assert joined.removeprefix(" ") == text


def test_the_lower_bound_on_tokens_holds() -> None:
    for text in ("", "x" * 1000, TEXT * 50, "The quick brown fox jumps" * 20, "专家混合模型" * 30):
        assert TOKENIZER.least_tokens(text) <= len(TOKENIZER.text_tokens(text))
    assert TOKENIZER.least_tokens("x" * 100_000) > 1000
    assert ChatTokenizer(sentencepiece_like()).least_tokens("x" * 100_000) == 0
