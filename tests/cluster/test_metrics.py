"""The table of all metrics: its names, its page in infra/prometheus, and how many series it can be. A second."""

from pathlib import Path

import pytest

from autoscale.signals import Reason
from cluster import metrics
from cluster.errors import error_code, error_codes
from cluster.metrics import METRICS, sections
from cluster.metrics_page import MOST_EXPERT_SERIES, MOST_REASONS, SHAPES, page, series
from deployments.directory_metering import MOST_SERIES, busiest_kept
from tests.prometheus import PREFIX, promtool
from tests.recorder import RESERVED

PAGE = Path(__file__).parents[2] / "infra" / "prometheus" / "METRICS.md"


def test_the_page_is_what_the_table_makes():
    assert PAGE.read_text() == page(), "run `make metrics`"


def test_every_metric_is_declared_once_and_stands_in_a_section():
    assert [m for found in sections().values() for m in found] == list(METRICS)
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert sum(isinstance(value, metrics.Section) for value in vars(metrics).values()) == len(sections())


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_says_what_it_is(metric):
    assert metric.meaning.endswith(".")
    assert "\n" not in metric.meaning
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert not RESERVED & set(metric.labels)


def test_prometheus_has_nothing_to_say_about_the_names():
    lines = []
    for metric in METRICS:
        name = PREFIX.removesuffix("expertscale_") + metric.name
        labels = ",".join(f'{label}="x"' for label in metric.labels)
        lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.kind}"]
        if metric.kind == "histogram":
            inf = ",".join(filter(None, [labels, 'le="+Inf"']))
            lines += [f"{name}_bucket{{{inf}}} 1", f"{name}_sum{{{labels}}} 1", f"{name}_count{{{labels}}} 1"]
        else:
            lines.append(f"{name}{{{labels}}} 1")
    assert promtool("check", "metrics", stdin="\n".join(lines) + "\n") == ""


def test_promtool_would_have_something_to_say():
    with pytest.raises(AssertionError, match="_total"):
        promtool("check", "metrics", stdin="# HELP ray_steps Steps.\n# TYPE ray_steps counter\nray_steps 1\n")


def test_series_are_bounded_for_the_largest_models():
    _, large = SHAPES
    assert (large.layers, large.experts) == (61, 256)
    every = {m: series(m, section, large) for section, found in sections().items() for m in found}
    assert every[metrics.EXPERT_ROWS_PER_S] == MOST_EXPERT_SERIES
    assert MOST_EXPERT_SERIES == MOST_SERIES >= large.layers * (busiest_kept(large.layers) + 1)
    assert len(Reason) <= MOST_REASONS
    assert max(every.values()) == every[metrics.DECISIONS] == (large.groups + 1) * 2 * MOST_REASONS


def test_every_error_of_the_tree_has_a_code_of_its_own_on_the_page():
    text = PAGE.read_text()
    assert len(set(error_codes())) == len(error_codes())
    assert all(f"`{code}`" in text for code in error_codes())
    assert error_code(ValueError()) in error_codes()
