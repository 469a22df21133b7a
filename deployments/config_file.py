"""Reads the YAML file that `serve run` takes, and derives the one that is really run.

Knows the outer shape of the file (Serve's own schema is checked by Serve's own classes); what `args` mean is
`cluster.config`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import AppConfig, parse_args
from cluster.errors import ConfigError

IMPORT_PATH = "deployments.app:build"
HOST = "127.0.0.1"
"""Where `make serve` listens unless the file names a host."""
ENCODING_VARIABLE = "RAY_SERVE_LOG_ENCODING"
ENCODINGS = ("TEXT", "JSON")
"""How lines of log files are written; text unless told otherwise. Ray's names, and its variable, which goes before the
file's `logging_config`."""


@dataclass(frozen=True)
class ConfigFile:
    """A parsed file: the raw document, and the validated arguments of its one application."""

    path: Path
    document: dict[str, Any]
    args: AppConfig

    def encoding(self, environ: Mapping[str, str]) -> str:
        """How log files are written: as is said first by `environ`, the file, its application; else as text.

        Raises:
            ConfigError: the variable holds another word.
        """
        said = environ.get(ENCODING_VARIABLE) or self._outer_encoding()
        application = self.document["applications"][0].get("logging_config") or {}
        said = said or application.get("encoding") or ENCODINGS[0]
        if said not in ENCODINGS:
            raise ConfigError(f"{ENCODING_VARIABLE}: the value {said!r} is not allowed: use {' or '.join(ENCODINGS)}.")
        return str(said)

    def derived(self, port: int, environ: Mapping[str, str]) -> str:
        """The YAML text that is run: HTTP on loopback at `port` unless the file itself names a host.

        What is said of all log files, by `environ` or the outer `logging_config`, is set wherever Serve would take
        another encoding. Where nothing is, what an application or a deployment says of its own stays as it is.
        """
        document = copy.deepcopy(self.document)
        http = document.setdefault("http_options", {})
        http.setdefault("host", HOST)
        http["port"] = port
        encoding = self.encoding(environ)
        [application] = document["applications"]
        everywhere = bool(environ.get(ENCODING_VARIABLE) or self._outer_encoding())
        inner = (application, *(application.get("deployments") or [])) if everywhere else ()
        for each in (document, *inner):
            if each.get("logging_config") is not None or (each is document and encoding != ENCODINGS[0]):
                each["logging_config"] = {**(each.get("logging_config") or {}), "encoding": encoding}
        return yaml.safe_dump(document, sort_keys=False)

    def _outer_encoding(self) -> str | None:
        said = (self.document.get("logging_config") or {}).get("encoding")
        return None if said is None else str(said)

    @property
    def application(self) -> str:
        """The name of the Serve application."""
        return str(self.document["applications"][0].get("name", "default"))


def read(path: Path) -> ConfigFile:
    """Read and validate the file.

    Raises:
        ConfigError: one sentence per error, joined by newlines.
    """
    document = _load(path)
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"applications: {path} must list exactly one application.")
    import_path = applications[0].get("import_path")
    if import_path != IMPORT_PATH:
        raise ConfigError(f"applications.0.import_path: the value {import_path!r} is not allowed: use {IMPORT_PATH!r}.")
    args = parse_args(applications[0].get("args") or {})
    _check_serve_schema(document)
    return ConfigFile(path, document, args)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"the config file {path} is not valid YAML{line}.") from None
    if not isinstance(document, dict):
        raise ConfigError(f"the config file {path} must hold a mapping with the key `applications`.")
    return document


def _check_serve_schema(document: dict[str, Any]) -> None:
    """Let Serve judge the outer keys: a file it would reject later must not start a cluster first."""
    from ray.serve import schema  # two seconds of imports that a wrong `args` need not wait for

    application = document["applications"][0]
    # Serve itself drops keys it does not know, and with them what their author wanted.
    _refuse_unknown(document, schema.ServeDeploySchema, "")
    _refuse_unknown(application, schema.ServeApplicationSchema, "applications.0.")
    _refuse_unknown(document.get("http_options") or {}, schema.HTTPOptionsSchema, "http_options.")
    for number, deployment in enumerate(application.get("deployments") or []):
        _refuse_unknown(deployment, schema.DeploymentSchema, f"applications.0.deployments.{number}.")
    try:
        schema.ServeDeploySchema.model_validate(copy.deepcopy(document))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"])
            lines.append(f"{key}: the value {item['input']!r} is not allowed: {item['msg']}.")
        raise ConfigError("\n".join(lines)) from None


def _refuse_unknown(given: Any, schema: Any, where: str) -> None:
    if isinstance(given, dict) and (unknown := sorted(set(map(str, given)) - set(schema.model_fields))):
        allowed = ", ".join(sorted(schema.model_fields))
        raise ConfigError(f"{where}{unknown[0]}: unknown key; allowed here: {allowed}.")
