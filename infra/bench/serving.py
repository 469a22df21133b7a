"""The whole product under load: decoding and first tokens through HTTP, and memory, for the demo and for deepseek6.

Starts what `make serve` starts, once a model, and the processes it is compared with; measures in decode.py,
first_token.py and memory.py; stops all of it, the server as a user does, and insists that nothing is left. Memory is
looked at once the whole model and the engine alone have ended: they map the same libraries, a share of which would
count as theirs. A smoke run starts no server and no Ray: only the whole model and the engine alone, on a random model
of two layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from infra.bench import transformers_serve
from infra.bench.context import Context
from infra.bench.decode import Sides, against_peer, best_threads, decode, without_server
from infra.bench.figures import Figure
from infra.bench.first_token import first_token
from infra.bench.http_load import Endpoint
from infra.bench.memory import memory
from infra.bench.models import BenchModel, models
from infra.bench.reference import WholeModel
from infra.bench.server import Server, free_port, running
from infra.bench.split_model import SplitModel

FIELDS = {"ignore_eos": True, "stream_options": {"include_usage": True}}


def run(context: Context) -> Iterable[Figure]:
    """Both models, one after the other. The demo, whose weights are real, also meets the peer."""
    for model in models(context):
        if context.smoke:
            with WholeModel(model.folder) as whole, SplitModel(model.args) as engine:
                yield from decode(context, Sides(model, whole, engine))
        else:
            yield from _served(context, model)


def _served(context: Context, model: BenchModel) -> Iterator[Figure]:
    with ExitStack() as references:
        whole = references.enter_context(WholeModel(model.folder))
        alone = without_server(context, model, whole)
        context.progress(f"{model.name}: starting the server")
        with _server(context, model) as server:
            # While the server starts, too.
            engine = references.enter_context(SplitModel(model.args))
            server.await_health()
            context.has_served = True
            endpoint = Endpoint(f"{server.url}/v1/completions", model.args.model.served_name, FIELDS, server.pids)
            yield from first_token(context, model, whole, endpoint)
            yield from decode(context, Sides(model, whole, engine, endpoint, alone))
            is_demo = model.name == "demo"
            threads = best_threads(model, whole) if is_demo else 0
            references.close()
            yield from memory(model, endpoint, whole.parameter_bytes)
            if is_demo:
                with _peer(context, model, threads) as other:
                    about = f"transformers serve, {threads} threads"
                    yield from against_peer(context, model, endpoint, other, about)


@contextmanager
def _server(context: Context, model: BenchModel) -> Iterator[Server]:
    """The model served as `make serve` does, on a free port of the loopback interface; not healthy yet."""
    port = free_port()
    config = model.write_config(context.scratch)
    command = [sys.executable, "-m", "deployments.launch", str(config), "--port", str(port)]
    with running(command, port, context.scratch / f"{model.name}.log", {}) as server:
        yield server


@contextmanager
def _peer(context: Context, model: BenchModel, threads: int) -> Iterator[Endpoint]:
    """`transformers serve` for the same weights, with `threads` torch threads; healthy when entered."""
    port = free_port()
    folder = transformers_serve.without_end(model.folder, context.scratch / f"{model.name}-peer")
    command = transformers_serve.command(folder, port)
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with running(command, port, context.scratch / f"{model.name}-peer.log", environment) as server:
        server.await_health()
        yield transformers_serve.endpoint(folder, port, server.pids)
