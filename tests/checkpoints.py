"""What tests of damaged and unusual checkpoints share: changing a folder, and judging the message it leads to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError


def one_sentence(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    """The message, which must be one sentence on one line."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def edit_config(folder: Path, **values: Any) -> None:
    """Replace values in the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
