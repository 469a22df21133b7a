"""What a result depends on beside the code: processor, versions, and the thread variables the run was started with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")


def about_machine() -> dict[str, Any]:
    """For the JSON line. cores: those this process may use. A variable that is not set is null."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _cpu_name() -> str:
    """As the kernel calls it; the architecture where it has no name for it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
