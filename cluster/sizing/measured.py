"""The measured figures that the step time starts from, as infra/bench/README.md states them; a test compares the two.

All on two shared virtual CPU cores with four expert processes on the same machine. On other machines they are other
figures; between nodes nothing has been measured.
"""

SCATTER_S = 278e-6
"""Scatter and gather of one layer, T=8, H=256, 4 groups: its Python and wake-ups, as its bytes hardly count."""
SCATTER_GROUPS = 4
GROUP_STEP_S = 0.136e-3
"""One more group in every MoE layer of the demo model, from 4 to 8 groups, 8 sequences: of a whole step."""
GROUP_STEP_LAYERS = 4
"""MoE layers of that model."""


def hop_s(groups: int) -> float:
    """Scatter and gather of one layer to so many groups, without the time that its bytes or experts take.

    4 groups: 278 us, as measured; each beyond that 34 us more, which is extrapolated beyond 8.
    """
    return SCATTER_S + max(0, groups - SCATTER_GROUPS) * GROUP_STEP_S / GROUP_STEP_LAYERS
