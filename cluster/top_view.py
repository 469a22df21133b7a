"""One event of the live picture as tables for a terminal. Pure: mapping in, something `rich` can print out.

What nobody knows is shown as a dash, never as zero. Columns that only explain are left out on narrow terminals.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

NARROW = 80
"""Columns of a terminal below which a table is cut down to its essentials."""
HOTTEST, DECISIONS = 8, 5
UNKNOWN = "-"
_STATES = {"ready": "green", "joining": "yellow", "draining": "yellow"}


def picture(event: Mapping[str, Any] | None, trouble: str = "", width: int = 120) -> RenderableType:
    """event: the newest, None before the first. trouble: why none comes now, one sentence. width: in columns."""
    parts: list[RenderableType] = []
    if trouble:
        parts.append(Text(f"{trouble} Trying again every second.", style="bold red"))
    if event is None:
        return Group(*parts, *([] if trouble else [Text("Waiting for the first event.")]))
    narrow = width < NARROW
    parts += [_health(event), _totals(event["rates"])]
    cluster = event["cluster"]
    if cluster is not None:
        parts += [
            _groups(cluster["groups"], group_rates(event["heat"]), narrow),
            _routers(cluster["routers"], narrow),
            _hottest(event["heat"]),
            _decisions(cluster["decisions"], narrow),
        ]
    return Group(*parts)


def group_rates(heat: Mapping[str, Any]) -> dict[int, float]:
    """Number of a group -> rows a second of all its experts."""
    rates: dict[int, float] = {}
    for rows, groups in zip(heat["rows_per_s"], heat["group"], strict=True):
        for rate, group in zip(rows, groups, strict=True):
            rates[group] = rates.get(group, 0.0) + rate
    return rates


def hottest(heat: Mapping[str, Any], count: int = HOTTEST) -> list[tuple[float, int, int, int]]:
    """(rows a second, layer, expert, number of its group) of the `count` experts with the most, none without any."""
    found = [
        (float(rate), layer, expert, group)
        for layer, rows, groups in zip(heat["layers"], heat["rows_per_s"], heat["group"], strict=True)
        for expert, (rate, group) in enumerate(zip(rows, groups, strict=True))
        if rate > 0
    ]
    return sorted(found, key=lambda each: (-each[0], *each[1:]))[:count]


def _health(event: Mapping[str, Any]) -> Text:
    health = event["health"]
    model = (event["cluster"] or {}).get("model", UNKNOWN)
    text = Text.assemble((f"{model}  ", "bold"), f"{_clock(event['time'])}  ")
    if health["status"] == "ok" and not health["missing"]:
        text.append("ok", style="green")
    else:
        text.append(f"{health['status']}: {', '.join(health['missing'])} missing", style="bold red")
    for part, reason in health["reasons"].items():
        text.append(f"\n  {part}: {reason}", style="yellow")
    return text


def _totals(rates: Mapping[str, Any]) -> Text:
    return Text(
        f"{_number(rates['tokens_per_s'])} tokens/s   {_number(rates['requests_running'])} running   "
        f"{_number(rates['requests_waiting'])} waiting   first token {_number(rates['ttft_p95_ms'])} ms   "
        f"next {_number(rates['tpot_p95_ms'])} ms (p95)"
    )


def _groups(groups: Sequence[Mapping[str, Any]], rates: Mapping[int, float], narrow: bool) -> Table:
    table = _table("Groups", "group", "rows/s>", "replica", "state", "busy>", *([] if narrow else ["pool", "speed>"]))
    for number, group in enumerate(groups):
        replicas = group["replicas"]
        first = [f"{group['name']} {len(replicas)}/{group['target_replicas']}", _number(rates.get(number))]
        for replica in replicas:
            state = Text(replica["state"], style=_STATES.get(replica["state"], "red"))
            busy = UNKNOWN if replica["utilization"] is None else f"{100 * replica['utilization']:.0f} %"
            extra = [] if narrow else [replica["pool"], _number(replica["speed_rows_per_s"])]
            table.add_row(*map(_text, first), _text(_short(replica["id"])), state, busy, *map(_text, extra))
            first = ["", ""]
        if not replicas:
            table.add_row(*map(_text, first), Text("none", style="bold red"), *[""] * (len(table.columns) - 3))
        for failure in group.get("failures", [])[-1:]:
            table.add_row("", "", Text(failure["reason"], style="red"), *[""] * (len(table.columns) - 3))
    return table


def _routers(routers: Sequence[Mapping[str, Any]], narrow: bool) -> Table:
    extra = [] if narrow else ["tokens>", "preempted>", "first ms>", "next ms>"]
    table = _table("Routers", "router", "running>", "waiting>", "kv tokens>", *extra)
    for router in routers:
        numbers = [router["running"], router["waiting"], router["kv_used_tokens"]]
        if not narrow:
            numbers += [router.get(key) for key in ("tokens_generated", "preemptions", "ttft_p95_ms", "tpot_p95_ms")]
        table.add_row(_text(_short(router["id"])), *map(_number, numbers))
    return table


def _hottest(heat: Mapping[str, Any]) -> Table:
    table = _table("Hottest experts", "layer>", "expert>", "group>", "rows/s>")
    for rate, layer, expert, group in hottest(heat):
        table.add_row(str(layer), str(expert), str(group), _number(rate))
    return table


def _decisions(decisions: Sequence[Mapping[str, Any]], narrow: bool) -> Table:
    table = _table("Last decisions", *([] if narrow else ["time", "group", "change"]), "reason")
    for each in sorted(decisions, key=lambda decision: -float(decision["time"]))[:DECISIONS]:
        change = f"{each['from']} -> {each['to']}"
        row = [] if narrow else [_clock(each["time"]), str(each["group"]), change]
        table.add_row(*map(_text, [*row, str(each["reason"])]))
    return table


def _table(title: str, *columns: str) -> Table:
    """A name that ends with `>` is a column of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    return table


def _text(value: str) -> Text:
    """As it stands: names and reasons are no markup."""
    return Text(value)


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"..{name[-8:]}"


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 10 or float(value).is_integer() else f"{value:.1f}"


def _clock(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))
