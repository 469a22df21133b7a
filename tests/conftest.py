"""Set-up every test shares: the thread variables of threads.env, and no hub, before anything imports torch."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for line in (ROOT / "threads.env").read_text().splitlines():
    name, _, value = line.partition("=")
    os.environ[name] = value
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Test processes must find the packages and the tests' own helpers wherever they are started from.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
