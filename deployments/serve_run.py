"""`serve run`, whose controller and proxies log in the encoding of RAY_SERVE_LOG_ENCODING: TEXT or JSON.

Of the `logging_config` of a config, `serve run` of Ray 2.60 tells the replicas alone, and the variable, which Ray
documents, is read nowhere (`serve deploy` and KubeRay tell all). `deployments.launch` starts this.
"""

from __future__ import annotations

import os

from ray.serve import schema
from ray.serve.scripts import cli

from deployments.config_file import ENCODING_VARIABLE

if __name__ == "__main__":
    # What a `LoggingConfig` without an encoding takes, and `serve run` starts Serve with one.
    schema.RAY_SERVE_LOG_ENCODING = os.environ.get(ENCODING_VARIABLE, schema.RAY_SERVE_LOG_ENCODING)
    cli()
