"""SECURITY.md names the tests that hold its claims, and numbers that the code has too."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.config import IngressSpec
from deployments.ingress import parsing, schemas, validation
from deployments.ingress.keys import parse_keys

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_numbers_are_the_codes() -> None:
    assert IngressSpec().max_body_bytes == 4 << 20
    assert parsing.MAX_HEADER_BYTES == 32 << 10
    assert validation.MAX_CHOICES == schemas.MAX_PROMPTS  # counted after the parsing
    for number, words in (
        (parsing.MAX_DEPTH, "levels"),
        (parsing.MAX_HEADERS, "headers"),
        (schemas.MAX_MESSAGES, "messages"),
        (schemas.MAX_PROMPTS, "prompts"),
        (schemas.MAX_STOPS, "stop strings"),
        (schemas.MAX_STOP_CHARS, "characters"),
        (schemas.MAX_LOGIT_BIAS, "biased tokens"),
    ):
        assert re.search(rf"\b{number:,}\s+{words}", TEXT), words


def test_the_example_line_is_one() -> None:
    [line] = re.findall(r"^alice .*$", TEXT, re.MULTILINE)
    [record] = parse_keys(line, "SECURITY.md")
    assert record.line() == line
