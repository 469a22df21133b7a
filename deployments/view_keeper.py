"""Which view of the cluster a router uses while the Directory restarts. Pure: time is passed in."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.membership import View

PATIENCE_S = 10.0


class ViewKeeper:
    """Which view a router uses: the newest, but a restarted Directory's only when it has caught up.

    A new incarnation starts empty. Until it knows a ready replica of every group that the view in use has one for, or
    for `patience_s` at most, the last view of the old incarnation stays in use. Time is passed in.
    """

    def __init__(self, groups: Sequence[str], *, patience_s: float = PATIENCE_S) -> None:
        self._groups = tuple(groups)
        self._patience_s = patience_s
        self._in_use: View | None = None
        self._waiting: tuple[str, float] | None = None

    def accept(self, view: View, now: float) -> View:
        """Take in what the Directory says at `now` (seconds); returns the view to use."""
        if self._in_use is None or self._newer(view, self._in_use, now):
            self._in_use, self._waiting = view, None
        return self._in_use

    def patience_left_s(self, now: float) -> float | None:
        """Seconds until a new incarnation is believed whatever it says; None where none is waiting."""
        return None if self._waiting is None else max(0.0, self._waiting[1] + self._patience_s - now)

    def _newer(self, view: View, in_use: View, now: float) -> bool:
        if view.epoch.incarnation == in_use.epoch.incarnation:
            # The one in use speaks: whoever was catching up is not the successor, or not yet.
            self._waiting = None
            return view.epoch.n >= in_use.epoch.n
        if self._waiting is None or self._waiting[0] != view.epoch.incarnation:
            self._waiting = (view.epoch.incarnation, now)
        caught_up = set(view.missing(self._groups)) <= set(in_use.missing(self._groups))
        return caught_up or self.patience_left_s(now) == 0.0
