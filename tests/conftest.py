"""Set-up every test shares: the thread variables of threads.env, and no hub, before anything imports torch.

What tests record with `record_property` is printed at the end of the run.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import hypothesis

ROOT = Path(__file__).resolve().parent.parent

for line in (ROOT / "threads.env").read_text().splitlines():
    name, _, value = line.partition("=")
    os.environ[name] = value
# Run in the background of a shell, tests have Ctrl-C ignored, and so would every server that is stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Test processes must find the packages and the tests' own helpers wherever they are started from.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Cases of a property take as long as the machine lets them: the timeout of the whole test is the bound.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what was measured or counted on the way, passed or not."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    measured = [(report.nodeid, report.user_properties) for report in reports if report.user_properties]
    if measured:
        terminalreporter.section("recorded")
    for nodeid, properties in measured:
        shown = ", ".join(f"{name} {value}" for name, value in properties)
        terminalreporter.write_line(f"{nodeid.removeprefix('tests/')}: {shown}")
