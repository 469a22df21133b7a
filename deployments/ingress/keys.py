"""API keys as they are stored: one line a key, with the key's SHA-256 in place of the key.

    NAME sha256:HEX requests_per_min=60 tokens_per_min=20000 streams=4

Blank lines and lines that start with # are skipped; every limit may be left out.

    python -m deployments.ingress.keys new NAME [LIMIT=N ...] >> KEYFILE     makes a key, shown once on the terminal
    python -m deployments.ingress.keys hash NAME [LIMIT=N ...] >> KEYFILE    the line for a key read from standard input

A plain hash is enough, and cheap enough for every request: keys are 256 random bits, which nobody guesses however fast
a guess is. Slow hashes protect passwords, which people think up. `hash` therefore asks for at least 32 characters.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from cluster.errors import ConfigError

KEY_PREFIX = "xs-"
LEAST_CHARS = 32
MAX_LIMIT = 10**12
MAX_KEYS = 10_000
SCHEME = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class KeyLimits:
    """What one key may use at one Ingress replica; None for any amount.

    requests_per_min: all that carry the key but those that another of its limits refuses at once.
    tokens_per_min: prompt and completion together.
    streams: choices of all prompts under way at once, streamed or not.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    streams: int | None = None


LIMITS = ("requests_per_min", "tokens_per_min", "streams")


@dataclass(frozen=True)
class KeyRecord:
    """One line. digest: SHA-256 of the key, 32 bytes; equal lengths, so that a comparison tells nothing of a key's."""

    name: str
    digest: bytes
    limits: KeyLimits = KeyLimits()

    def line(self) -> str:
        """The record as it is stored."""
        given = [(name, getattr(self.limits, name)) for name in LIMITS]
        words = [f"{name}={value}" for name, value in given if value is not None]
        return " ".join([self.name, SCHEME + self.digest.hex(), *words])


def digest_of(key: str) -> bytes:
    """SHA-256 of a key as sent or stored."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def new_key() -> str:
    """A key nobody has: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def parse_keys(text: str, source: str) -> tuple[KeyRecord, ...]:
    """The records of a key file's text. source: what to call it in errors.

    Raises:
        ConfigError: for the first line that is none. Its text is never repeated: it may be a key.
    """
    records: dict[bytes, KeyRecord] = {}
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        record = _record(words, f"{source}, line {number}")
        if record.name in names or record.digest in records:
            raise ConfigError(f"{source}, line {number}: its name or its key stands in an earlier line; remove one.")
        if len(records) == MAX_KEYS:
            raise ConfigError(f"{source}, line {number}: more than {MAX_KEYS} keys; allowed: up to {MAX_KEYS}.")
        names.add(record.name)
        records[record.digest] = record
    return tuple(records.values())


def _record(words: Sequence[str], where: str) -> KeyRecord:
    if len(words) < 2 or not words[1].startswith(SCHEME) or not _HEX.fullmatch(words[1].removeprefix(SCHEME)):
        raise ConfigError(
            f"{where}: a line should be `NAME {SCHEME}HEX [LIMIT=N ...]` and never hold a key itself; for the line of "
            "a key, pipe the key into `python -m deployments.ingress.keys hash NAME`."
        )
    digest = bytes.fromhex(words[1].removeprefix(SCHEME))
    return KeyRecord(_name(words[0], where), digest, _limits(words[2:], where))


def _name(word: str, where: str) -> str:
    if not _NAME.fullmatch(word):
        raise ConfigError(f"{where}: a name has up to 64 letters, digits, dots, dashes, @ or underscores.")
    return word


def _limits(words: Sequence[str], where: str) -> KeyLimits:
    limits = KeyLimits()
    for word in words:
        name, _, number = word.partition("=")
        if name not in LIMITS or getattr(limits, name) is not None:
            raise ConfigError(f"{where}: allowed after the hash, each once: {', '.join(f'{n}=N' for n in LIMITS)}.")
        if not _NUMBER.fullmatch(number) or not int(number):
            raise ConfigError(f"{where}: {name} should be a whole number from 1 to {MAX_LIMIT - 1}.")
        limits = replace(limits, **{name: int(number)})
    return limits


def main(arguments: Sequence[str], keys: TextIO, lines: TextIO, told: TextIO) -> int:
    """The command line; returns the exit status. The line goes to `lines`, the key once to `told`."""
    if len(arguments) < 2 or arguments[0] not in ("new", "hash"):
        print(f"usage: python -m deployments.ingress.keys new|hash NAME [{'=N] ['.join(LIMITS)}=N]", file=told)
        return 2
    try:
        name, limits = _name(arguments[1], "NAME"), _limits(arguments[2:], "LIMIT")
        key = new_key() if arguments[0] == "new" else keys.readline().strip()
        if not all("!" <= char <= "~" for char in key):
            raise ConfigError("the key has other characters than visible ASCII; a header cannot carry them faithfully.")
        if len(key) < LEAST_CHARS:
            raise ConfigError(f"the key has {len(key)} characters; at least {LEAST_CHARS} random ones are needed.")
    except ConfigError as error:
        print(error, file=told)
        return 1
    if arguments[0] == "new":
        print(f"The key, shown only now: {key}", file=told, flush=True)
    print(KeyRecord(name, digest_of(key), limits).line(), file=lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin, sys.stdout, sys.stderr))
