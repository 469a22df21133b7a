"""The whole product under load: decoding and first tokens through HTTP, and memory, for the demo and for deepseek6.

Starts what `make serve` starts, once a model, and the processes it is compared with; measures in decode.py,
first_token.py and memory.py; stops all of it, the server as a user does, and insists that nothing is left. A smoke run
starts no server and no Ray: only the whole model and the engine alone, on a random model of two layers.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.config import project_root
from infra.bench import transformers_serve
from infra.bench.context import Context
from infra.bench.decode import against_peer, best_threads, decode
from infra.bench.figures import Figure
from infra.bench.first_token import first_token
from infra.bench.http_load import Endpoint
from infra.bench.memory import memory
from infra.bench.models import BenchModel, models
from infra.bench.reference import WholeModel
from infra.bench.split_model import SplitModel

READY_S, STOP_S, LEFT_S, POLL_S = 180.0, 60.0, 2.0, 0.2
LOG_TAIL_CHARS = 4000
FIELDS = {"ignore_eos": True, "stream_options": {"include_usage": True}}


def run(context: Context) -> Iterable[Figure]:
    """Both models, one after the other. The demo, whose weights are real, also gives memory and meets the peer."""
    for model in models(context):
        with WholeModel(model.folder) as whole, SplitModel(model.args) as engine:
            if context.smoke:
                yield from decode(context, model, whole, engine, None)
            else:
                yield from _served(context, model, whole, engine)


def _served(context: Context, model: BenchModel, whole: WholeModel, engine: SplitModel) -> Iterator[Figure]:
    context.progress(f"{model.name}: starting the server")
    with server(context, model) as endpoint:
        yield from first_token(context, model, whole, endpoint)
        yield from decode(context, model, whole, engine, endpoint)
        if model.name == "demo":
            yield from memory(model, endpoint, whole.parameter_bytes)
            threads = best_threads(model, whole)
            with peer(context, model, threads) as other:
                about = f"transformers serve, {threads} threads"
                yield from against_peer(context, model, endpoint, other, about)


@contextmanager
def server(context: Context, model: BenchModel) -> Iterator[Endpoint]:
    """The model served as `make serve` does, on a free port of the loopback interface, ready when entered."""
    port = free_port()
    config = model.write_config(context.scratch)
    command = [sys.executable, "-m", "deployments.launch", str(config), "--port", str(port)]
    with running(command, port, context.scratch / f"{model.name}.log", {}) as process:
        url = f"http://127.0.0.1:{port}/v1/completions"
        yield Endpoint(url, model.args.model.served_name, FIELDS, lambda: _family(process))


@contextmanager
def peer(context: Context, model: BenchModel, threads: int) -> Iterator[Endpoint]:
    """`transformers serve` for the same weights, with `threads` torch threads."""
    port = free_port()
    folder = transformers_serve.without_end(model.folder, context.scratch / f"{model.name}-peer")
    command = transformers_serve.command(folder, port)
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with running(command, port, context.scratch / f"{model.name}-peer.log", environment) as process:
        yield transformers_serve.endpoint(folder, port, lambda: _family(process))


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, then press Ctrl-C. `environment` is added to this process's own.

    Raises:
        RuntimeError: it ended or was not healthy in time (the message holds the end of its output), or left
            processes behind; those are killed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=project_root(),
            env={**inherited, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield process
    finally:
        _stop(process)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _family(process: subprocess.Popen[bytes]) -> list[int]:
    parent = psutil.Process(process.pid)
    return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise RuntimeError(f"not healthy (exit status {process.poll()}):\n{log.read_text()[-LOG_TAIL_CHARS:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(children, timeout=LEFT_S)
    for child in left:
        child.kill()
    if left:
        raise RuntimeError(f"{len(left)} processes of the server outlived it and were killed")
