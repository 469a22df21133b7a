"""Train the demo model on the corpus, on two CPU threads.

    python infra/demo-model/train.py --build BUILD --steps 1000

reads BUILD/corpus.json (see corpus.py), writes the Hugging Face folder `checkpoint/` beside this file, and
BUILD/log.jsonl. The result depends on the corpus, the seed, the number of steps and the thread count, not on the clock.
The learning rate is constant until its last fifth (warm-up, stable, decay: Hu et al. 2024, MiniCPM), so the length of
a run can still be changed before that: --resume with another --steps continues as a run of that length would have.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from corpus import DOMAINS
from routing import Record, domain_balance_loss, recorded_routing
from tokens import VOCABULARY, Streams, domain_streams, train_tokenizer
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CHECKPOINT = Path(__file__).parent / "checkpoint"
SEED = 0
STEP_TOKENS = 3072  # per step, in rows that are dealt to the domains in turn
LENGTH, LONG_LENGTH, LONG_EVERY = 256, 1024, 8  # every eighth step has rows as long as the model may see
CHAT_ROWS = 3  # of a short step's 12 rows, one per domain, are chat samples
PEAK_RATE, WARMUP_STEPS, DECAY_SHARE = 2e-3, 60, 0.2
BALANCE_WEIGHT, WITHIN_DOMAIN = 0.01, 0.5
LOG_EVERY, SAVE_EVERY = 10, 100  # steps
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # the order of SPECIAL_TOKENS


def build_model() -> DeepseekV3ForCausalLM:
    """5.3 M parameters; one dense layer, then four with 16 routed experts each."""
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=96,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def batch(streams: list[Streams], step: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows, length] and the domain of each row [rows]; a function of the step alone, so runs can resume."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    long = step % LONG_EVERY == LONG_EVERY - 1
    length = LONG_LENGTH if long else LENGTH
    domains = torch.arange(STEP_TOKENS // length) % len(streams)
    rows = []
    for row, domain in enumerate(domains.tolist()):
        chat = not long and row < CHAT_ROWS
        source = streams[domain].chat if chat else streams[domain].text
        last = len(source) - length
        # A chat window begins with an exchange, as a request does; a text window begins anywhere.
        starts = (source[:last] == BOS_ID).nonzero().flatten() if chat else torch.arange(last)
        start = int(starts[torch.randint(len(starts), (1,), generator=generator)])
        rows.append(source[start : start + length])
    return torch.stack(rows), domains


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear to 2 % of the peak over the last DECAY_SHARE of the steps."""
    decay = max(0.02, min(1.0, (steps - step) / (DECAY_SHARE * steps)))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def train_step(
    model: DeepseekV3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    records: list[Record],
    tokens: Tensor,
    domains: Tensor,
) -> tuple[float, float]:
    """One update; returns (language loss in nats per token, balance loss averaged over layers)."""
    records.clear()
    loss = model(input_ids=tokens, labels=tokens).loss
    domain_of_token = domains.repeat_interleave(tokens.shape[1])
    losses = [domain_balance_loss(record, domain_of_token, len(DOMAINS), WITHIN_DOMAIN) for record in records]
    balance = torch.stack(losses).mean()
    optimizer.zero_grad()
    (loss + BALANCE_WEIGHT * len(losses) * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), balance.item()


def save(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The whole Hugging Face folder, weights as bfloat16; the model in training keeps its float32 weights."""
    copy = DeepseekV3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=0.7, top_k=40
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(build: Path) -> tuple[PreTrainedTokenizerFast, list[Streams]]:
    """The tokenizer and one set of streams per domain; leaves the held-out documents for evaluate.py."""
    corpus = json.loads((build / "corpus.json").read_text())
    texts = {d: [item["text"] for item in corpus["documents"] if item["domain"] == d] for d in DOMAINS}
    tokenizer = train_tokenizer(texts)
    streams = [domain_streams(d, texts[d], tokenizer, SEED) for d in DOMAINS]
    torch.save(dict(zip(DOMAINS, (s.held_out for s in streams), strict=True)), build / "held_out.pt")
    for domain, part in zip(DOMAINS, streams, strict=True):
        print(
            f"{domain}: {len(part.text)} tokens of text, {len(part.chat)} of chat, {len(part.held_out)} held out",
            flush=True,
        )
    return tokenizer, streams


def train(build: Path, out: Path, steps: int, resume: bool) -> None:
    """The loop: one update per step, a log line every LOG_EVERY, checkpoint and state every SAVE_EVERY."""
    tokenizer, streams = prepare(build)
    torch.manual_seed(SEED)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    first, before_s = 0, 0.0
    if resume:
        state = torch.load(build / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before_s = state["step"], state["wall_s"]
    started = time.monotonic()
    with recorded_routing(model) as records, (build / "log.jsonl").open("a" if resume else "w") as log:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss, balance = train_step(model, optimizer, records, *batch(streams, step))
            wall_s = round(before_s + time.monotonic() - started, 1)
            done = step + 1
            if step % LOG_EVERY == 0 or done == steps:
                row = {"step": step, "tokens": done * STEP_TOKENS, "loss": loss, "balance": balance, "wall_s": wall_s}
                print(json.dumps(row), file=log, flush=True)
            if done % SAVE_EVERY == 0 or done == steps:
                save(model, tokenizer, out)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": done, "wall_s": wall_s}, build / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, required=True, help="folder with corpus.json; receives log and state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="Hugging Face folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="continue from BUILD/state.pt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.build, args.out, args.steps, args.resume)


if __name__ == "__main__":
    main()
