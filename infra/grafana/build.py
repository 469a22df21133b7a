"""Boards as Grafana's dashboards, through Grafana's own types (`grafana-foundation-sdk`), ready to be imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from infra.grafana.words import Board, Panel, Query

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT, TALL = 8, 14
LINKED = models.DashboardLinkType.DASHBOARDS


def text(board: Board) -> str:
    """The file of a board."""
    plain = json.loads(JSONEncoder().encode(built(board)))
    return json.dumps(plain, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def built(board: Board) -> models.Dashboard:
    """The dashboard of a board."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"expertscale-{board.name}")
        .description(board.description)
        .tags(["expertscale"])
        .time("now-30m", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("ExpertScale").type(LINKED).tags(["expertscale"]).as_dropdown(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_application())
    )
    id = 0
    for row in board.rows:
        made = made.with_row(dashboard.Row(row.title).id(id := id + 1))
        for panel in row.panels:
            made = made.with_panel(_panel(panel).id(id := id + 1))
    return made.build()


def _application() -> Any:
    return (
        dashboard.QueryVariable("application")
        .label("Application")
        .description("Serve's name of the application.")
        .datasource(SOURCE)
        .query("label_values(ray_expertscale_routers, application)")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> Any:
    make = {"lines": _lines, "numbers": _numbers, "matrix": _matrix}[panel.kind]
    made = make(panel).title(panel.title).description(panel.description).unit(panel.unit)
    return made.datasource(SOURCE).height(TALL if panel.kind == "matrix" else HEIGHT).span(panel.width)


def _lines(panel: Panel) -> Any:
    made = timeseries.Panel().min(0).fill_opacity(10).show_points(options.VisibilityMode.NEVER)
    legend = common.VizLegendOptions().show_legend(True).display_mode(options.LegendDisplayMode.LIST)
    made = made.legend(legend.placement(options.LegendPlacement.BOTTOM))
    made = made.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A")).fill_opacity(40)
    return _asking(made, panel.queries)


def _numbers(panel: Panel) -> Any:
    """Green at 0, red above."""
    steps = [models.Threshold(value=None, color="green"), models.Threshold(value=1, color="red")]
    limits = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
    made = stat.Panel().thresholds(limits).color_mode(options.BigValueColorMode.BACKGROUND)
    return _asking(made.text_mode(options.BigValueTextMode.VALUE_AND_NAME), panel.queries)


def _matrix(panel: Panel) -> Any:
    """A row for each layer, a column for each expert, the colour of a cell its value: a table made a heat map."""
    [query] = panel.queries
    shown = models.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-background", "mode": "basic"})
    colours = dashboard.FieldColor().mode(models.FieldColorModeId.CONTINUOUS_YL_RD)
    made = table.Panel().decimals(0).color_scheme(colours).override_by_regexp(r"^(\d+|other)$", [shown])
    steps: tuple[tuple[str, Any], ...] = (
        ("convertFieldType", {"conversions": [{"targetField": "layer", "destinationType": "number"}], "fields": {}}),
        ("sortBy", {"fields": {}, "sort": [{"field": "layer"}]}),
        ("groupingToMatrix", {"columnField": "expert", "rowField": "layer", "valueField": "Value"}),
    )
    for name, how in steps:
        made = made.with_transformation(models.DataTransformerConfig(id_val=name, options=how))
    asked = prometheus.Dataquery().expr(query.expr).format(PromQueryFormat.TABLE).instant().ref_id("A")
    return made.with_target(asked.datasource(SOURCE))


def _asking(made: Any, queries: Sequence[Query]) -> Any:
    for number, query in enumerate(queries):
        asked = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number))
        made = made.with_target(asked.datasource(SOURCE))
    return made
