"""Write the dashboards beside this file: python -m infra.grafana"""

from __future__ import annotations

from pathlib import Path

from infra.grafana.build import text
from infra.grafana.panels import BOARDS

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":
    for board in BOARDS:
        (FOLDER / f"{board.name}.json").write_text(text(board))
