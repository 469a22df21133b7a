"""Measure the trained demo model on documents it has not seen: loss, routing by domain, unedited samples.

    python infra/demo-model/evaluate.py --build BUILD

reads checkpoint/ and BUILD/held_out.pt, writes expert_load.json beside this file, and prints the model card's tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from routing import expert_shares, moe_layers, recorded_routing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LENGTH, ROWS_AT_ONCE, MAX_ROWS = 512, 4, 64
CONTINUED = [
    "def read(self, path):\n",
    "class Queue:\n",
    "The function returns",
    "The program is",
    "如果文件",
    "这个命令",
]
ASKED = [
    "Write python: return the size of the file",
    "Continue: def close(self):",
    "What is socket?",
    "Continue: The file descriptor must be open.",
    "ls 是什么？",
    "继续：这个选项用于指定文件名。",
]


class Measured(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    shares: Tensor  # [L, E]


@torch.no_grad()
def measure(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> Measured:
    """Loss and expert load over the first MAX_ROWS windows of LENGTH tokens of one domain's held-out stream [N]."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:MAX_ROWS]
    layers, losses = len(moe_layers(model)), []
    with recorded_routing(model) as records:
        for part in torch.split(rows, ROWS_AT_ONCE):
            losses.append((model(input_ids=part, labels=part).loss.item(), len(part)))
    chosen = [torch.cat([record[1] for record in records[layer::layers]]) for layer in range(layers)]
    loss = sum(value * count for value, count in losses) / len(rows)
    n_bytes = len(tokenizer.decode(rows.flatten(), skip_special_tokens=True).encode())
    shares = torch.stack([expert_shares(c, model.config.n_routed_experts) for c in chosen])
    return Measured(loss, loss * rows.numel() / math.log(2) / n_bytes, shares)


def total_variation(a: Tensor, b: Tensor) -> list[float]:
    """Per layer, the share of rows that would have to move to turn one load into the other: [L, E] x 2 -> [L]."""
    return (0.5 * (a - b).abs().sum(dim=1)).tolist()


@torch.no_grad()
def sample(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: Tensor, max_tokens: int
) -> tuple[str, bool]:
    """Continuation of ids [1, T] by the model's own generation settings, and whether it ended with </s>."""
    torch.manual_seed(0)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), made[-1].item() == tokenizer.eos_token_id


def print_tables(measured: dict[str, Measured], layers: list[int]) -> None:
    print("\n| domain | loss, nats per token | perplexity | bits per byte |\n|---|---|---|---|")
    for name, m in measured.items():
        print(f"| {name} | {m.loss:.2f} | {math.exp(m.loss):.0f} | {m.bits_per_byte:.2f} |")
    columns = "".join(f" layer {layer} |" for layer in layers)
    print(f"\n| total-variation distance |{columns} mean |\n" + "|---" * (len(layers) + 2) + "|")
    for a, b in itertools.combinations(measured, 2):
        distance = total_variation(measured[a].shares, measured[b].shares)
        print(f"| {a} - {b} |", *(f"{value:.2f} |" for value in distance), f"{sum(distance) / len(distance):.2f} |")
    print(f"\n| busiest experts (share) |{columns}\n" + "|---" * (len(layers) + 1) + "|")
    for name, m in measured.items():
        cells = (", ".join(f"{int(e)} ({s:.2f})" for s, e in zip(*row.topk(4), strict=True)) for row in m.shares)
        print(f"| {name} |", *(f"{cell} |" for cell in cells))


def print_samples(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in CONTINUED:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        print(f"\n>>> {prompt!r}\n{prompt}{sample(model, tokenizer, ids, 80)[0]}")
    ended = 0
    for question in ASKED:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt").input_ids
        text, stopped = sample(model, tokenizer, ids, 160)
        ended += stopped
        print(f"\n>>> user: {question}\n{text}{' </s>' if stopped else ' ...'}")
    print(f"\n{ended} of {len(ASKED)} chat answers ended with </s> within 160 tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, required=True, help="folder with held_out.pt, written by train.py")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "expert_load.json")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.eval()
    held_out: dict[str, Tensor] = torch.load(args.build / "held_out.pt")
    measured = {name: measure(model, tokenizer, tokens) for name, tokens in held_out.items()}
    domains = {name: [[round(s, 5) for s in row] for row in m.shares.tolist()] for name, m in measured.items()}
    load = {"model": "expertscale-demo-5m", "layers": moe_layers(model), "domains": domains}
    args.out.write_text(json.dumps(load).replace("], [", "],\n [").replace('"domains"', '\n"domains"') + "\n")
    print_tables(measured, moe_layers(model))
    print_samples(model, tokenizer)


if __name__ == "__main__":
    main()
