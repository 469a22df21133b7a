"""A Terraform provider that knows only the schema of Alibaba Cloud's: enough for `validate` and for tests with mocks.

Run by Terraform, in the environment of requirements.txt; `EXPERTSCALE_ALICLOUD_SCHEMAS` names the schema files,
separated like PATH. It knows no cloud: planning or applying without mocks fails, and what only the real provider checks
(values, combinations of arguments) is not checked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tf.provider
import tf.runner
from tf.gen import tfplugin_pb2 as pb
from tf.gen import tfplugin_pb2_grpc as rpc

NESTING = {"single": 1, "list": 2, "set": 3, "map": 4, "group": 5}
FLAGS = ("required", "optional", "computed", "sensitive", "deprecated")
PROVIDER_ARGUMENTS = ("region", "access_key", "secret_key", "profile")


def schemas() -> dict[str, Any]:
    """Resource name -> schema, of all files."""
    merged: dict[str, Any] = {}
    for name in os.environ["EXPERTSCALE_ALICLOUD_SCHEMAS"].split(os.pathsep):
        merged |= json.loads(Path(name).read_text())
    return merged


def block(description: dict[str, Any]) -> pb.Schema.Block:
    """A block of the provider protocol from one of `terraform providers schema -json`."""
    attributes = [
        pb.Schema.Attribute(
            name=name,
            type=json.dumps(attribute["type"]).encode(),
            **{flag: attribute.get(flag, False) for flag in FLAGS},
        )
        for name, attribute in description.get("attributes", {}).items()
    ]
    nested = [
        pb.Schema.NestedBlock(
            type_name=name,
            block=block(inner["block"]),
            nesting=NESTING[inner["nesting_mode"]],
            min_items=inner.get("min_items", 0),
            max_items=inner.get("max_items", 0),
        )
        for name, inner in description.get("block_types", {}).items()
    ]
    return pb.Schema.Block(attributes=attributes, block_types=nested)


class SchemaOnly(rpc.ProviderServicer):  # type: ignore[misc]
    """Answers what Terraform asks before it plans."""

    def __init__(self, provider: object) -> None:
        self._provider = provider

    def GetProviderSchema(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        arguments = [pb.Schema.Attribute(name=name, type=b'"string"', optional=True) for name in PROVIDER_ARGUMENTS]
        return pb.GetProviderSchema.Response(
            provider=pb.Schema(block=pb.Schema.Block(attributes=arguments)),
            resource_schemas={
                name: pb.Schema(block=block(schema["block"]), version=schema.get("version", 0))
                for name, schema in schemas().items()
            },
        )

    def ValidateProviderConfig(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return pb.ValidateProviderConfig.Response()

    def ValidateResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return pb.ValidateResourceConfig.Response()

    def ConfigureProvider(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return pb.ConfigureProvider.Response()

    def StopProvider(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return pb.StopProvider.Response()


if __name__ == "__main__":
    tf.provider.ProviderServicer = SchemaOnly
    tf.runner.run_provider(None)
