"""The policy file on disk: read once, or followed while somebody edits it.

    python -m autoscale.policy_file check FILE

says in one sentence per error what is wrong with a policy file. What its groups and pools are is not known here: the
check of a whole configuration, `python -m deployments.app check CONFIG`, compares them too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from autoscale.policy_checks import check_against as check_against
from autoscale.policy_text import MAX_BYTES, parse
from autoscale.spec import TAGS, PolicySpec
from cluster.errors import ConfigError
from cluster.sentences import sentences, shown

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""The file is looked at no more often."""
SETTLED_S = 2.0
"""A file that was modified so shortly before it was read may be half written, or be modified again within the same tick
of the file system's clock: it is read again."""

Stamp = tuple[int, int, int, int]
"""What tells a changed file: mtime and ctime in ns, size, inode."""


@dataclass(frozen=True)
class _Content:
    stamp: Stamp
    raw: bytes


def read(path: str | Path) -> PolicySpec:
    """The policy in a file.

    Raises:
        ConfigError: it cannot be read, or is not valid; one sentence per error, joined by newlines.
    """
    return _spec_of(_content(path).raw)


class PolicyFile:
    """A policy file that is followed: the last valid text stays in force until another valid one is there.

    path: a symbolic link is followed, so that a Kubernetes ConfigMap, which swaps links, is seen to change.
    clock: seconds that rise, for how often to look. check: sentences on what a valid policy asks for in vain; one with
    any is refused. wall: Unix seconds, to be compared with the file's own times.

    spec: the policy in force; None if there never was a valid one. error: why the file, as it is now, is not in force,
    by lines; None where it is. version_hash: of the text in force. loaded_at: since when, in Unix seconds.
    """

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[PolicySpec], Iterable[str]] = lambda _spec: (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.spec: PolicySpec | None = None
        self.error: str | None = None
        self.version_hash: str | None = None
        self.loaded_at: float | None = None
        self._path = path
        self._clock, self._check, self._wall = clock, check, wall
        self._looked_at = float("-inf")
        self._stamp: Stamp | None = None
        self._settled = False
        self._raw: bytes | None = None
        self.refresh()

    def refresh(self) -> bool:
        """Look at the file where it is time to; whether the policy in force has changed. Never raises.

        Most calls do nothing, one each `LOOK_S` asks for the file's status, and only a changed file is read.
        """
        now = self._clock()
        if 0 <= now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        try:
            if self._settled and _stamp(os.stat(self._path)) == self._stamp:
                return False
            return self._read()
        except ConfigError as error:
            self._refuse(str(error))
        except OSError as error:
            self._forget()
            self._refuse(_unreadable(error))
        except Exception as error:
            self._refuse(f"the file cannot be judged: {shown(repr(error))}; the policy in force stays.")
        return False

    def _read(self) -> bool:
        """Read the file and judge its text, if that is another one than the last.

        Raises:
            ConfigError: it is not valid.
        """
        try:
            content = _content(self._path)
        except ConfigError:
            self._forget()
            raise
        self._stamp = content.stamp
        self._settled = self._wall() - content.stamp[0] / 1e9 >= SETTLED_S
        if content.raw == self._raw:
            return False
        self._raw = content.raw
        spec = _spec_of(content.raw)
        if misfits := list(self._check(spec)):
            raise ConfigError("\n".join(misfits))
        return self._accept(spec, hashlib.sha256(content.raw).hexdigest()[:12])

    def _forget(self) -> None:
        """There is no text at the moment: whatever comes next is to be read and judged."""
        self._stamp, self._settled, self._raw = None, False, None

    def _accept(self, spec: PolicySpec, version_hash: str) -> bool:
        changed = version_hash != self.version_hash
        if changed:
            self.spec, self.version_hash, self.loaded_at = spec, version_hash, self._wall()
        if changed or self.error is not None:
            logger.info("policy file %s: version %s is in force", self._path, version_hash)
        self.error = None
        return changed

    def _refuse(self, error: str) -> None:
        if error != self.error:
            kept = "no policy is in force" if self.spec is None else f"version {self.version_hash} stays in force"
            logger.warning("policy file %s is refused, %s: %s", self._path, kept, error)
        self.error = error


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _content(path: str | Path) -> _Content:
    """The file's bytes, and the stamp of the very file they came from.

    Raises:
        ConfigError: it cannot be read, is no regular file or is too large.
    """
    try:
        # Not blocking, because opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError("the file cannot be read: it is no regular file; allowed: a YAML file.")
            with open(descriptor, "rb", closefd=False) as file:
                return _Content(_stamp(status), file.read(MAX_BYTES + 1))
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise ConfigError(_unreadable(error)) from None


def _unreadable(error: OSError | ValueError) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"the file cannot be read: {reason}; allowed: a YAML file of up to {MAX_BYTES} bytes."


def _spec_of(raw: bytes) -> PolicySpec:
    """The policy in a text.

    Raises:
        ConfigError: it is not valid.
    """
    document = parse(raw)
    try:
        return PolicySpec.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, PolicySpec, name="policy", tags=TAGS))) from None


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "check":
        print("usage: python -m autoscale.policy_file check FILE", file=sys.stderr)
        return 2
    try:
        read(arguments[1])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments[1]}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
