"""Draw the training loss from BUILD/log.jsonl as loss.svg beside this file.

    python infra/demo-model/loss_curve.py --build BUILD

The SVG is written by hand: a plotting library would be the only reason to install one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 300, 56, 16, 700, 258  # the plot area inside the picture, pixels
LABEL = 'font-family="sans-serif" font-size="12" fill="#444"'


def smoothed(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def draw(tokens: list[int], losses: list[float]) -> str:
    """The SVG of loss against tokens: every logged step as a pale line, its running mean in front."""
    low, high = int(min(losses)), int(max(losses)) + 1

    def point(x: float, y: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * x / tokens[-1]:.1f},{BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low):.1f}"

    def line(values: list[float], style: str) -> str:
        points = " ".join(point(x, y) for x, y in zip(tokens, values, strict=True))
        return f'<polyline fill="none" {style} points="{points}"/>'

    marks = []
    for y in range(low, high + 1):
        height = point(0, y).split(",")[1]
        marks.append(f'<path stroke="#ddd" d="M{LEFT} {height}H{RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{float(height) + 4:.1f}" text-anchor="end" {LABEL}>{y}</text>')
    for millions in range(tokens[-1] // 1_000_000 + 1):
        x = point(millions * 1_000_000, low).split(",")[0]
        marks.append(f'<text x="{x}" y="{BOTTOM + 18}" text-anchor="middle" {LABEL}>{millions} M</text>')
    marks.append(f'<text x="{LEFT}" y="{HEIGHT - 6}" {LABEL}>training loss (nats per token) against tokens seen</text>')
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}">',
            f'<rect {size} fill="#fff"/>',
            *marks,
            line(losses, 'stroke="#b8cbe6" stroke-width="1"'),
            line(smoothed(losses, 10), 'stroke="#1f4e9c" stroke-width="2"'),
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, required=True, help="folder with log.jsonl, written by train.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "loss.svg")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.build / "log.jsonl").read_text().splitlines()]
    by_step = {row["tokens"]: row["loss"] for row in rows}  # a resumed run logs the steps after its state again
    args.out.write_text(draw(list(by_step), list(by_step.values())))


if __name__ == "__main__":
    main()
