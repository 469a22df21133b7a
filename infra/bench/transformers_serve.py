"""The peer: `transformers serve`, transformers' own HTTP server, for the same checkpoint on the CPU.

    python -m infra.bench.transformers_serve FOLDER PORT

runs what `transformers serve FOLDER --port PORT --device cpu --dtype float32` would run, but for one thing: the command
always passes a `device_map`, which needs `accelerate` even where nothing is to be placed; here the model is loaded
without one. Requests are generated one after the other: that is its default, and its continuous batching fails on the
demo (transformers 5.23 sizes the paged cache by `head_dim`, which is not the size of MLA's keys).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.bench.http_load import Endpoint


def command(folder: Path, port: int) -> list[str]:
    """What starts the server."""
    return [sys.executable, "-m", "infra.bench.transformers_serve", str(folder), str(port)]


def endpoint(folder: Path, port: int, pids: Callable[[], list[int]]) -> Endpoint:
    """The running server."""
    return Endpoint(f"http://127.0.0.1:{port}/v1/completions", str(folder), {}, pids)


def without_end(folder: Path, copy: Path) -> Path:
    """A copy of the checkpoint that never ends a sequence early: requests cannot ask for that here."""
    shutil.copytree(folder, copy)
    settings = {"bos_token_id": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


def main(arguments: Sequence[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class OnCpu(model_manager.ModelManager):  # type: ignore[misc]  # transformers is not typed
        """Loads without a `device_map`."""

        def _load_model(self, *positional: Any, **named: Any) -> Any:
            self.device = None
            return super()._load_model(*positional, **named)

    model_manager.ModelManager = OnCpu
    folder, port = arguments
    Serve(force_model=folder, device="cpu", dtype="float32", host="127.0.0.1", port=int(port))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
