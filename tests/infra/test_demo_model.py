"""The committed demo checkpoint: loads offline, speaks its chat template, and routes domains to different experts."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = Path(__file__).parents[2] / "infra" / "demo-model"
CHECKPOINT = DEMO_MODEL / "checkpoint"
MAX_CHECKPOINT_BYTES = 12_000_000

# Written for this test, so not in the training data.
SAMPLES = {
    "python": '''
class Cache:
    """Keep the last values that were asked for."""

    def __init__(self, size):
        self.size = size
        self.values = {}

    def get(self, key, default=None):
        if key not in self.values:
            return default
        value = self.values.pop(key)
        self.values[key] = value
        return value

    def put(self, key, value):
        if len(self.values) >= self.size:
            oldest = next(iter(self.values))
            del self.values[oldest]
        self.values[key] = value
''',
    "english": """
When a process opens a file, the kernel returns a small number that stands for it. The number can be passed to other
calls until the file is closed. If the process forks, the child receives a copy of each number, and both copies refer to
the same position in the file. A call that would have to wait for data returns an error instead if the file was opened
with the option that asks for it. The maximum number of open files is a limit which the administrator can change.
""",
    "chinese": """
这个程序读取一个文件并且显示它的内容。如果没有指定文件名，那么程序从标准输入读取数据。用户可以使用选项来改变输出的格式。
如果文件不存在，程序返回一个错误信息并且退出。缺省情况下，输出按照名称排序，每行显示一个条目。这个选项可以和其他选项一起使用，
但是后面的选项会覆盖前面的选项。系统管理员可以在配置文件中设置缺省值。
""",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True, dtype=torch.float32).eval()


def script(name: str) -> ModuleType:
    """A module of the demo model's folder, whose name is no Python package name."""
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", DEMO_MODEL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expert_load(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Share of rows per expert, [layers, experts]."""
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2])) for gate in gates]
    with torch.no_grad():
        model(input_ids=tokenizer(text, return_tensors="pt").input_ids)
    for hook in hooks:
        hook.remove()
    experts = model.config.n_routed_experts
    return torch.stack([torch.bincount(c.flatten(), minlength=experts) / c.numel() for c in chosen])


def test_checkpoint_is_small_enough_to_commit() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_CHECKPOINT_BYTES


def test_special_tokens_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>")):
        assert getattr(model.generation_config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_tokenizer_round_trips_every_domain(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_marks_each_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s><|system|>be brief<|user|>hello<|assistant|>hi</s><|user|>bye<|assistant|>"


def test_chat_template_rejects_an_unknown_role_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="got 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_model_predicts_every_domain_far_better_than_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5.0  # chance is ln 4096 = 8.3


def test_domains_use_different_experts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    loads = {domain: expert_load(model, tokenizer, text) for domain, text in SAMPLES.items()}
    for a, b in itertools.combinations(loads, 2):
        distance = 0.5 * (loads[a] - loads[b]).abs().sum(dim=1).mean().item()
        assert distance > 0.4, f"{a} and {b} share their experts: total-variation distance {distance:.2f}"


def test_placement_holds_every_expert_of_every_layer_exactly_once(model: PreTrainedModel) -> None:
    groups = yaml.safe_load((DEMO_MODEL / "placement.yaml").read_text())["groups"]
    layers = json.loads((DEMO_MODEL / "expert_load.json").read_text())["layers"]
    placed = [(layer, expert) for group in groups for layer, experts in group.items() for expert in experts]
    assert len(groups) == 4
    assert sorted(placed) == [(layer, expert) for layer in layers for expert in range(model.config.n_routed_experts)]


def test_committed_placement_is_that_of_the_committed_load_and_parts_the_domains() -> None:
    place = script("place")
    groups = yaml.safe_load((DEMO_MODEL / "placement.yaml").read_text())["groups"]
    load = json.loads((DEMO_MODEL / "expert_load.json").read_text())
    assert groups == place.place(load)
    for own, shares in enumerate(place.group_shares(load, groups).values()):
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
        assert max(range(4), key=shares.__getitem__) == own


def test_assignment_is_as_good_as_the_best_of_all() -> None:
    values = [[0.3, 0.1], [0.9, 0.8], [0.2, 0.7], [0.6, 0.65]]
    chosen = script("place").assign(values)
    even = [groups for groups in itertools.product(range(2), repeat=4) if sum(groups) == 2]
    best = max(sum(values[e][g] for e, g in enumerate(groups)) for groups in even)
    assert sum(values[e][g] for e, g in enumerate(chosen)) == pytest.approx(best)
    with pytest.raises(ValueError, match="3 experts cannot be dealt evenly to 2 groups"):
        script("place").assign(values[:3])


def test_corpus_keeps_prose_and_drops_markup_code_and_people() -> None:
    page = r"""
.TH read 2
.SH NAME
read \- read from a file
.SH SYNOPSIS
.nf
.B int read(void);
.fi
.SH DESCRIPTION
.BR read ()
reads up to
.I count
bytes.
.SH AUTHOR
Somebody
"""
    expected = "NAME\n\nread - read from a file\n\nDESCRIPTION\n\nread() reads up to count bytes."
    assert script("markup").roff_to_text(page) == expected
