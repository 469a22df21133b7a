"""Key lines and the command that makes them (well under 1 s)."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from deployments.ingress.keys import LIMITS, KeyLimits, KeyRecord, digest_of, main, parse_keys

SECRET = "xs-a-key-that-stands-in-the-file-as-it-is-0123456789"
HASH = f"sha256:{digest_of('first').hex()}"

limits = st.builds(KeyLimits, *[st.none() | st.integers(1, 10**12 - 1) for _ in LIMITS])
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True)


@given(name=names, key=st.text(), limits=limits)
def test_a_line_reads_back_as_what_it_was_made_of(name: str, key: str, limits: KeyLimits) -> None:
    record = KeyRecord(name, digest_of(key), limits)
    assert parse_keys(f"# ours\n\n  {record.line()}  \r\n", "the file") == (record,)


@given(st.text())
def test_any_text_is_keys_or_one_sentence(text: str) -> None:
    refused = ""
    try:
        parse_keys(text, "the file")
    except ConfigError as error:
        refused = str(error)
    assert re.fullmatch(r"(the file, line \d+: .*\.)?", refused)


@pytest.mark.parametrize(
    "line",
    [
        SECRET,
        f"alice {SECRET}",
        f"alice sha256:{SECRET}",
        f"{SECRET}/+ {HASH}",
        f"alice {HASH} {SECRET}",
        f"alice {HASH} streams={SECRET}",
    ],
)
def test_a_key_in_the_file_is_refused_and_never_repeated(line: str) -> None:
    with pytest.raises(ConfigError, match="the file, line 2: ") as caught:
        parse_keys(f"\n{line}\n", "the file")
    assert SECRET not in str(caught.value)


def test_the_sentence_for_a_plain_key_says_how_to_hash_it() -> None:
    with pytest.raises(ConfigError, match=r"python -m deployments\.ingress\.keys hash NAME"):
        parse_keys(SECRET, "the file")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"alice {HASH} streams=0", "streams should be a whole number from 1"),
        (f"alice {HASH} streams=-1", "streams should be a whole number"),
        (f"alice {HASH} streams=1e3", "streams should be a whole number"),
        (f"alice {HASH} streams=\u0664", "streams should be a whole number"),
        (f"alice {HASH} tokens_per_min={10**12}", "tokens_per_min should be a whole number from 1 to 999999999999"),
        (f"alice {HASH} streams=1 streams=2", "each once"),
        (f"alice {HASH} requests=5", "requests_per_min=N, tokens_per_min=N, streams=N"),
        (f"al/ice {HASH}", "a name has"),
        (f"alice {HASH.upper()}", "should be `NAME sha256:HEX"),
        (f"alice {HASH}\nalice sha256:{digest_of('second').hex()}", "line 2: its name or its key stands in an earlier"),
        (f"alice {HASH}\nbob {HASH}", "line 2: its name or its key stands in an earlier"),
    ],
)
def test_a_wrong_line_is_one_sentence_naming_its_number(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(line, "the file")
    assert words in str(caught.value)


def run(*arguments: str, keys: str = "") -> tuple[int, str, str]:
    """(exit status, lines for the file, what the terminal shows)."""
    lines, told = io.StringIO(), io.StringIO()
    return main(arguments, io.StringIO(keys), lines, told), lines.getvalue(), told.getvalue()


def test_a_new_key_is_told_once_and_only_its_hash_is_stored() -> None:
    status, line, told = run("new", "alice", "streams=4", "tokens_per_min=20000")
    key = told.split()[-1]
    assert (status, told.count(key), key in line) == (0, 1, False)
    assert len(key) >= 43
    assert parse_keys(line, "") == (KeyRecord("alice", digest_of(key), KeyLimits(tokens_per_min=20000, streams=4)),)
    assert run("new", "alice")[2] != told


def test_a_known_key_is_hashed_without_being_shown() -> None:
    status, line, told = run("hash", "bob", keys=SECRET + "\n")
    assert (status, told) == (0, "")
    assert parse_keys(line, "") == (KeyRecord("bob", digest_of(SECRET)),)


@pytest.mark.parametrize(
    ("arguments", "keys", "status", "words"),
    [
        ((), "", 2, "usage"),
        (("make", "alice"), "", 2, "usage"),
        (("new", "al ice"), "", 1, "NAME: a name has"),
        (("new", "alice", "streams=no"), "", 1, "LIMIT: streams should be"),
        (("hash", "alice"), "password\n", 1, "has 8 characters; at least 32"),
        (("hash", "alice"), "pässword" * 8 + "\n", 1, "visible ASCII"),
    ],
)
def test_a_wrong_command_stores_nothing(arguments: tuple[str, ...], keys: str, status: int, words: str) -> None:
    got, line, told = run(*arguments, keys=keys)
    assert (got, line) == (status, "")
    assert words in told
    assert "password" not in told
