"""What a soak counts, and what of it is a fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from tests.chaos.processes import Footprint

GROWTH = 0.05
SMALL = Footprint(rss_bytes=8 << 20, files=4, threads=4)
"""What one process may gain whatever its size. An arena of the allocator, a connection to a peer that came back or a
thread of a pool is 5 % and more of a small process, is made once, and says nothing of a leak."""
LEAST_EVERY_S = 120.0
"""Every kind of trouble has hit somebody once in so long, or the soak has not tried it."""
MEASURES: Mapping[str, Callable[[Footprint], int]] = {
    "rss": lambda each: each.rss_bytes,
    "files": lambda each: each.files,
    "threads": lambda each: each.threads,
}


@dataclass
class Accounts:
    """Of all requests. sent: begun; the other counts are how they ended. different: texts that were not as before."""

    sent: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def lost(self) -> int:
        """Requests that ended in no way, or (below zero) in more than one."""
        return self.sent - self.finished - self.cancelled - self.refused - len(self.failures)


@dataclass
class Report:
    """What a soak found.

    troubles, missed: kind -> how often it hit somebody, and how often nobody. kinds: what of -> its footprint before
    and after. left: what idle routers still hold. named: requests that were looked up in the server's log, those of
    the warm-ups too. contradictions: where the log says otherwise than the clients.
    """

    seconds: float
    accounts: Accounts
    troubles: Counter[str]
    missed: Counter[str]
    kinds: dict[str, tuple[Footprint, Footprint]]
    left: list[str]
    slowest_s: float
    named: int
    contradictions: list[str]

    def growth(self, measure: str) -> float:
        """Of all processes together: 0.05 is 5 % more than after the warm-up."""
        of = MEASURES[measure]
        before, after = (sum(of(pair[side]) for pair in self.kinds.values()) for side in (0, 1))
        return after / max(before, 1) - 1

    @property
    def faults(self) -> list[str]:
        """Why this is no success; empty where it is."""
        accounts = self.accounts
        return [
            *([f"{accounts.lost} requests are unaccounted for"] if accounts.lost else []),
            *(["nothing was finished"] if not accounts.finished else []),
            *[f"failed: {each}" for each in accounts.failures[:5]],
            *[f"other text: {each}" for each in accounts.different[:5]],
            *[f"left over: {each}" for each in self.left],
            *[f"server and client differ: {each}" for each in self.contradictions[:5]],
            *[
                f"all processes: {name} grew by {self.growth(name):.1%}"
                for name in MEASURES
                if self.growth(name) > GROWTH
            ],
            *self._grown(),
            *self._rare(),
        ]

    def _grown(self) -> Iterator[str]:
        for kind, (before, after) in self.kinds.items():
            for name, of in MEASURES.items():
                allowed = max(GROWTH * of(before), of(SMALL) * after.processes)
                if of(after) - of(before) > allowed:
                    yield f"{kind}: {name} grew from {of(before)} to {of(after)}"

    def _rare(self) -> Iterator[str]:
        least = int(self.seconds / LEAST_EVERY_S)
        for kind in sorted({*self.troubles, *self.missed}):
            if self.troubles[kind] < least:
                yield f"{kind}: hit somebody {self.troubles[kind]} times, not {least}"

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        accounts = {
            name: len(value) if isinstance(value, list) else value for name, value in asdict(self.accounts).items()
        }
        return {
            "seconds": round(self.seconds, 1),
            **accounts,
            "lost": self.accounts.lost,
            "in_server_log": self.named - len(self.contradictions),
            "contradictions": len(self.contradictions),
            "troubles": sum(self.troubles.values()),
            "troubles_that_hit_nobody": sum(self.missed.values()),
            "slowest_s": round(self.slowest_s, 2),
            **{f"{name}_growth": round(self.growth(name), 4) for name in MEASURES},
            "faults": self.faults,
        }

    def table(self) -> str:
        """For people."""
        accounts = self.accounts
        lines = [
            f"requests   {accounts.sent} sent: {accounts.finished} finished, {accounts.cancelled} hung up on, "
            f"{accounts.refused} refused, {len(accounts.failures)} failed, {accounts.lost} unaccounted for",
            f"server     {self.named - len(self.contradictions)} of {self.named} requests, warm-ups included, exactly "
            "once in its log and with the status their clients saw",
            f"answers    {accounts.tokens} tokens, {len(accounts.different)} texts not as without failures; "
            f"slowest request {self.slowest_s:.1f} s",
            f"troubles   {_listed(self.troubles)}",
            f"hit nobody {_listed(self.missed)}",
            "",
            f"{'processes':<14} {'RSS MiB':>16} {'files':>14} {'threads':>14}",
        ]
        for name, (before, after) in sorted(self.kinds.items()):
            lines.append(
                f"{after.processes} {name:<12} {before.rss_bytes >> 20:>7} ->{after.rss_bytes >> 20:>6} "
                f"{before.files:>6} ->{after.files:>5} {before.threads:>6} ->{after.threads:>5}"
            )
        return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()) if count) or "none"
