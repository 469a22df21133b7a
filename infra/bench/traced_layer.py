"""One layer's scatter and gather with spans and without, in turn: `python -m infra.bench.traced_layer`. Ten seconds.

Experts excluded (`expert_processes`), and nothing is sent: what a router pays to make the spans, and no more. Calls are
so short that a loaded machine disturbs few of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import set_span_in_context

from cluster.fabric.tracing import LayerSpans
from infra.bench.expert_processes import EXPERTS, WIDTHS, ExpertProcesses, new_dispatcher, new_stream
from infra.bench.measure import alternate

TOKENS, PER_TOKEN, ROUNDS, WARM_UP = 32, 2, 3000, 300


def main() -> None:
    """Print the medians, in microseconds."""
    tracer = TracerProvider().get_tracer("benchmark")
    spans = LayerSpans(tracer, set_span_in_context(tracer.start_span("step")))
    weight, index = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).topk(PER_TOKEN)
    hidden = torch.randn(TOKENS, WIDTHS[0])
    with ExpertProcesses() as experts:
        transport = new_stream()
        dispatcher = new_dispatcher(transport, experts.view)

        def layer_us(tracing: LayerSpans | None) -> float:
            dispatcher.tracing = tracing
            started_s = time.perf_counter()
            dispatcher.scatter_gather(0, hidden, index, weight)
            return 1e6 * (time.perf_counter() - started_s)

        sides: dict[str, Callable[[], float]] = {
            "plain": partial(layer_us, None),
            "traced": partial(layer_us, spans),
        }
        taken = alternate(sides, rounds=ROUNDS, warm_up=WARM_UP)
        transport.close()
    for name, samples in taken.items():
        print(f"{name:7} {samples.median:6.0f} us  ±{samples.spread:.0%}")


if __name__ == "__main__":
    main()
