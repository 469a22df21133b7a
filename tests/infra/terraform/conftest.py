"""One copy of each Terraform module, initialised once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.infra.terraform.terraform_runs import Module, alicloud_module, aws_module


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return aws_module(tmp_path_factory.mktemp("terraform") / "aws")


@pytest.fixture(scope="session")
def alicloud(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return alicloud_module(tmp_path_factory.mktemp("terraform"))
