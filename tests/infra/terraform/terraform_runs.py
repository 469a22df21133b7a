"""Running Terraform in a copy of a module, offline: nothing is downloaded and no file of the checkout is touched.

Optional programs are looked for here, and a test skips with the reason where one is missing:

- `terraform` on PATH;
- a folder with the AWS provider, as `init -plugin-dir` takes: `EXPERTSCALE_TF_PLUGINS`, else a `tf-plugins` in one of
  the folders at the root of the file system;
- `.expertscale/terraform-tools`, made by `make programs`: moto, and what Alibaba Cloud's schema-only provider needs;
- ../shared/terraform: the schema of that provider.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODULES = ROOT / "infra" / "terraform"
PLUGINS_VARIABLE, PLUGINS_NAME = "EXPERTSCALE_TF_PLUGINS", "tf-plugins"
PLUGINS = Path(os.environ.get(PLUGINS_VARIABLE) or next(Path("/").glob(f"*/{PLUGINS_NAME}"), PLUGINS_NAME)).absolute()
TOOLS = ROOT / ".expertscale" / "terraform-tools" / "bin" / "python"
ALICLOUD_SCHEMA = ROOT.parent / "shared" / "terraform" / "alicloud-1.283.0.schema.json"
MORE_ALICLOUD_SCHEMA = HERE / "alicloud-more.schema.json"
RUN_S = 120


@dataclass(frozen=True)
class Module:
    """A copy of a module, ready for commands."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `terraform ARGUMENTS -no-color`; stderr goes where stdout goes."""
        return subprocess.run(
            ["terraform", *arguments, "-no-color"],
            cwd=self.folder,
            env=_clean() | self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_S,
            check=False,
        )

    def copied(self, target: Path) -> Module:
        """A copy of this module in `target`, initialised as this one is."""
        shutil.copytree(self.folder, target, symlinks=True)
        return Module(target, self.environment)

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace the first `old` in `file`, which must be there."""
        path = self.folder / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1))


@dataclass(frozen=True)
class OwnTests:
    """One run of a module's own tests (`terraform test -json`)."""

    returncode: int
    output: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]

    def outputs(self, run: str) -> dict[str, Any]:
        """The module's outputs after the run block `run`, which applied it to mocks; of `-verbose` runs."""
        [state] = [each for each in self.messages if each["type"] == "test_state" and each["@testrun"] == run]
        return {name: output["value"] for name, output in state["test_state"]["outputs"].items()}


def need_terraform() -> None:
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed; see infra/terraform/README.md")


def need_tools() -> Path:
    """The interpreter of the tools' environment."""
    if not TOOLS.is_file():
        pytest.skip(".expertscale/terraform-tools is missing; `make programs` makes it where terraform is installed")
    return TOOLS


def aws_module(folder: Path) -> Module:
    """The AWS module, initialised with the provider of the plugin folder."""
    need_terraform()
    if not any(PLUGINS.glob("*/hashicorp/aws")):
        pytest.skip(f"{PLUGINS_VARIABLE}: {PLUGINS} has no hashicorp/aws provider; see infra/terraform/README.md")
    shutil.copytree(MODULES / "aws", folder)
    module = Module(folder, {"TF_CLI_CONFIG_FILE": os.devnull})
    done = module.run("init", "-input=false", f"-plugin-dir={PLUGINS}")
    assert done.returncode == 0, done.stdout
    return module


def alicloud_module(folder: Path) -> Module:
    """The Alibaba Cloud module, with a provider that knows the schema and nothing else."""
    need_terraform()
    python = need_tools()
    if not ALICLOUD_SCHEMA.is_file():
        pytest.skip("../shared/terraform has no schema of the alicloud provider")
    shutil.copytree(MODULES / "alicloud", folder / "module")
    provider = folder / "terraform-provider-alicloud"
    provider.write_text(f'#!/bin/sh\nexec "{python}" "{HERE / "alicloud_provider.py"}" "$@"\n')
    provider.chmod(0o755)
    config = folder / "terraform.rc"
    config.write_text(f'provider_installation {{\n  dev_overrides {{\n    "aliyun/alicloud" = "{folder}"\n  }}\n}}\n')
    schemas = os.pathsep.join(map(str, (ALICLOUD_SCHEMA, MORE_ALICLOUD_SCHEMA)))
    return Module(folder / "module", {"TF_CLI_CONFIG_FILE": str(config), "EXPERTSCALE_ALICLOUD_SCHEMAS": schemas})


def _clean() -> dict[str, str]:
    """The environment without credentials, other settings of Terraform, and our packages (the tools have their own)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "ALICLOUD_", "TF_"))}
    kept.pop("PYTHONPATH", None)
    return kept | {"CHECKPOINT_DISABLE": "1"}
