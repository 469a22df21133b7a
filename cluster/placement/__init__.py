"""Which group holds which expert: pure functions from expert counts, loads and devices to a `Placement`.

partition.py   Placement; contiguous, explicit          by_load.py     balanced, hot_aligned
files.py       load and placement files                 __main__.py    python -m cluster.placement plan, and report.py

The planner (planner.py, a `Plan` from loads and devices.py):

problem.py, bounds ──> allotments.py, devices to groups ──> fill.py, experts to groups ──> free.py, a plan from nothing
             ├──> exact.py, the best plan where the problem is small
             └──> moves.py, a plan few moves from today's; deal.py, devices to groups whose experts stay

It is imported from `cluster.placement.planner`: it needs numpy, which whoever only reads placements does not.
"""

from cluster.placement.by_load import balanced, hot_aligned
from cluster.placement.files import read_groups, read_load
from cluster.placement.partition import Experts, Placement, contiguous, explicit

__all__ = ["Experts", "Placement", "balanced", "contiguous", "explicit", "hot_aligned", "read_groups", "read_load"]
