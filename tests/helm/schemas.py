"""Whether a Kubernetes object is what its kind allows: unknown fields and wrong types are faults, one line each.

Native kinds by kubernetes-validate's schemas, custom kinds by the schemas of their definitions, which lie beside the
checkout (../shared) and are made strict here: a real API server would drop an unknown field, and with it what its
author wanted. HTTPRoute has no definition at hand: it is compared with a schema written here from the documentation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate.utils as native
import pytest
import yaml
from referencing import Resource
from referencing.jsonschema import EMPTY_REGISTRY

from tests.serving import ROOT

SHARED = ROOT.parent / "shared"
CUSTOM = {
    "RayService": "kuberay/rayservices.v1.schema.json",
    "RayCluster": "kuberay/rayclusters.v1.schema.json",
    "PodMonitor": "prometheus-operator/podmonitors.v1.schema.json",
    "PrometheusRule": "prometheus-operator/prometheusrules.v1.schema.json",
}
KUBERNETES = ("1.28", "1.36")
"""The oldest version the chart takes, and a new one."""
HTTP_ROUTE = yaml.safe_load(
    """
type: object
required: [apiVersion, kind, metadata, spec]
properties:
  apiVersion: {const: gateway.networking.k8s.io/v1}
  kind: {const: HTTPRoute}
  metadata: {type: object}
  spec:
    type: object
    properties:
      hostnames: {type: array, items: {type: string}}
      parentRefs:
        type: array
        items:
          type: object
          required: [name]
          properties:
            group: {type: string}
            kind: {type: string}
            name: {type: string}
            namespace: {type: string}
            port: {type: integer}
            sectionName: {type: string}
      rules:
        type: array
        items:
          type: object
          properties:
            matches:
              type: array
              items:
                type: object
                properties:
                  headers: {type: array}
                  method: {type: string}
                  path:
                    type: object
                    properties: {type: {enum: [Exact, PathPrefix, RegularExpression]}, value: {type: string}}
            backendRefs:
              type: array
              items:
                type: object
                required: [name]
                properties: {name: {type: string}, port: {type: integer}, weight: {type: integer}}
            timeouts:
              type: object
              properties: {request: {type: string}, backendRequest: {type: string}}
"""
)


def faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with `document`; skips the test where the schema of its kind is not on this machine."""
    validators = _validators(document["kind"], document["apiVersion"])
    return [
        f"{document['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for validator in validators
        for error in validator.iter_errors(document)
    ]


def missing_schemas() -> str | None:
    """Why custom kinds cannot be judged here; None where they can."""
    absent = [path for path in CUSTOM.values() if not (SHARED / path).is_file()]
    return f"the schemas of custom kinds are not beside the checkout: {', '.join(absent)}" if absent else None


@cache
def _validators(kind: str, api_version: str) -> tuple[Any, ...]:
    if kind in CUSTOM:
        if reason := missing_schemas():
            pytest.skip(reason)
        schema = strict(yaml.safe_load((SHARED / CUSTOM[kind]).read_text()))
        schema["properties"]["metadata"] = {"type": "object"}
        return (jsonschema.Draft202012Validator(schema),)
    if kind == "HTTPRoute":
        return (jsonschema.Draft202012Validator(strict(HTTP_ROUTE)),)
    return tuple(_native(kind, api_version, version) for version in KUBERNETES)


def _native(kind: str, api_version: str, version: str) -> Any:
    """kubernetes-validate's own `validate` reads 2 MB of definitions for each object; here they are read once."""
    group, _, number = api_version.rpartition("/")
    file = f"{kind.lower()}-{f'{group.split(chr(46))[0]}-' if group else ''}{number}"
    schema = native.schema_contents(f"kubernetes-json-schema/{_folder(version)}/{file}.json", version)
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@cache
def _definitions(version: str) -> Any:
    contents = native.schema_contents(f"kubernetes-json-schema/{_folder(version)}/_definitions.json", version)
    return Resource.from_contents(contents) @ EMPTY_REGISTRY


def _folder(version: str) -> str:
    return f"v{version}.0-local-strict"


def strict(node: Any) -> Any:
    """A definition's schema that refuses unknown fields, and in the dialect of jsonschema."""
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if node.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "(?i)" in str(node.get("pattern", "")):
        del node["pattern"]  # Go's syntax, of a field the chart does not use
    if "properties" in node:
        node["properties"] = {key: strict(value) for key, value in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = strict(node[key])
    return node
