"""How many threads torch may use where results must not depend on sizes. Knows no model."""

from __future__ import annotations

import torch

from cluster.errors import ConfigError


def require_one_thread(device: torch.device) -> None:
    """Threads cut element-wise work at places that depend on its size, in the middle of a vector.

    Raises:
        ConfigError: torch may use several threads on `device`.
    """
    if device.type == "cpu" and torch.get_num_threads() > 1:
        raise ConfigError(
            f"router.batch_invariant: true needs one CPU thread, but torch has {torch.get_num_threads()}: set "
            "OMP_NUM_THREADS=1."
        )
