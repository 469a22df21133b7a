"""What every replica of one deployment must agree on: load plan, placement, arithmetic and the digest over them.

The application builder makes it once and binds it to every replica. Compiling a load plan needs transformers (seconds
of imports), so plans are kept in `.expertscale/plans`, named after everything they depend on; `check` fills that cache
before Ray starts. Where nothing can be written there, each start compiles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from cluster.config import AppConfig, PlacementSpec, project_root, resolve
from cluster.errors import CheckpointError, PlacementError
from cluster.fabric import WIRE_VERSION
from cluster.load_plan import LoadPlan, model_digest
from cluster.placement import Placement, balanced, contiguous, explicit, hot_aligned, read_groups, read_load

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("*tokenizer*", "*.jinja", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.tiktoken")


@dataclass(frozen=True)
class Blueprint:
    """One model, cut and named. Crosses to the replicas as plain text and numbers.

    model_path: absolute folder of the checkpoint. digest: 32 bytes; both ends of every connection must have the same.
    vocabulary: hex; the same where clients ask for the same name and its tokens mean the same words.
    """

    model_path: str
    plan_json: str
    placement: Placement
    digest: bytes
    vocabulary: str = ""

    @cached_property
    def plan(self) -> LoadPlan:
        """The load plan, parsed on first use."""
        return LoadPlan.from_json(self.plan_json)


def make_blueprint(config: AppConfig) -> Blueprint:
    """Compile, or fetch from the cache, everything the replicas of `config` need.

    Raises:
        CheckpointError, UnsupportedModelError, PlacementError: one sentence each.
    """
    folder = resolve(config.model.path)
    plan_json = _cached_plan(folder, config.model.dtype)
    plan = LoadPlan.from_json(plan_json)
    placement = place(plan.experts_per_layer, config.experts.groups, config.experts.placement)
    digest = model_digest(plan, placement, dtype=plan.dtype, wire_version=WIRE_VERSION)
    return Blueprint(str(folder), plan_json, placement, digest, _vocabulary(folder, config.model.served_name))


def place(experts_per_layer: dict[int, int], groups: int, spec: PlacementSpec) -> Placement:
    """The placement `spec` asks for."""
    if spec.strategy == "contiguous" or spec.file is None:
        return contiguous(experts_per_layer, groups)
    file = resolve(spec.file)
    if spec.strategy != "explicit":
        by_load = balanced if spec.strategy == "balanced" else hot_aligned
        return by_load(experts_per_layer, groups, read_load(file))
    listed = read_groups(file)
    if len(listed) != groups:
        raise PlacementError(
            f"experts.groups: {groups} groups, but {spec.file} lists {len(listed)}; the two numbers must be equal."
        )
    return explicit(experts_per_layer, listed)


def _vocabulary(folder: Path, served_name: str) -> str:
    """Names what turns a client's words into tokens: the tokenizer's files, and the name the client asks for."""
    digest = hashlib.sha256(served_name.encode())
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}):
        digest.update(b"\0" + file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _cached_plan(folder: Path, dtype: str) -> str:
    """The plan of the checkpoint as JSON, compiled only if no file of the folder has changed since the last time."""
    key = _stamp(folder, dtype)
    cached = project_root() / ".expertscale" / "plans" / f"{key}.json"
    with suppress(OSError):  # not there, or another user's
        return cached.read_text()
    from cluster.checkpoint import compile_plan  # needs transformers

    text = compile_plan(folder, dtype).to_json()
    try:
        _keep(text, cached)
    except OSError as error:  # as in a container whose file system is read-only
        logger.info("the load plan is not kept in %s: %s; each start compiles it", cached.parent, error.strerror)
    return text


def _keep(text: str, path: Path) -> None:
    """Two starts may race: write aside and rename, so that nobody reads half a plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(aside, path)


def _stamp(folder: Path, dtype: str) -> str:
    """A name for (files of the folder, dtype, code that compiles), from sizes and times: nothing large is read.

    That code is ours and transformers', whose conversion mapping a plan writes down.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model.path: there is no folder {folder}; give the folder of a Hugging Face checkpoint.")
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    # A plan is only as good as the code that made it.
    code = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sorted(Path(__file__).parent.glob("*.py"))]
    code.append(version("transformers"))
    return hashlib.sha256(json.dumps([str(folder), dtype, stamps, code]).encode()).hexdigest()[:32]
