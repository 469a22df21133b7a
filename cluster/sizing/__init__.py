"""What a model needs and how a fleet of unequal GPUs can hold it, from its config.json alone: no weights, no cluster.

    config.json ──> shape.py ──> memory.py, router and experts ──┐
    --gpus ──────> gpus.py ──────────────────────────────────────┼──> fit.py ──> Plan ──> report.py, config_text.py
                        spread.py, experts to devices; step.py ──┘

shape.py        counts of numbers, from transformers' own model on the meta device: the one file here that needs torch
measured.py     the figures of infra/bench/README.md that step.py starts from
__main__.py     python -m cluster.sizing
"""
