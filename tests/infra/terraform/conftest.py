"""One copy of each Terraform module, initialised once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.infra.terraform.terraform_runs import Module, OwnTests, alicloud_module, aws_module


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return aws_module(tmp_path_factory.mktemp("terraform") / "aws")


@pytest.fixture(scope="session")
def alicloud(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return alicloud_module(tmp_path_factory.mktemp("terraform"))


@pytest.fixture(scope="session")
def own_tests(request: pytest.FixtureRequest) -> OwnTests:
    """The own tests of the module that a test is parametrised with. What `-verbose` adds takes AWS's provider long."""
    module: Module = request.getfixturevalue(request.param)
    done = module.run("test", "-json", *(["-verbose"] if request.param == "alicloud" else []))
    return OwnTests(done.returncode, done.stdout)
