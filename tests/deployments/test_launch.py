"""What the launcher gives `serve run` along. The rest of it is tests/e2e's."""

from __future__ import annotations

from deployments.launch import serve_environment


def test_the_variables_of_serve_env_are_those_that_serve_reads() -> None:
    from ray.serve._private import constants

    variables = serve_environment()
    assert variables
    for name, value in variables.items():
        assert value
        assert hasattr(constants, name)
