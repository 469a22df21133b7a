"""What a replica knows of the machine it runs on: its Ray node, and whether Ray gave it a GPU."""

from __future__ import annotations

import ray

from cluster.config import ResourceSpec
from cluster.errors import ConfigError


def node_id() -> str:
    """The Ray node this process runs on, in hex. Processes of one node can share Unix sockets."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


def listen_host(host: str) -> str:
    """The address to listen on: `host` itself, or where it is "node" the address Ray knows this node by."""
    return ray.util.get_node_ip_address() if host == "node" else host


def device_of(resources: ResourceSpec) -> str:
    """The torch device for a replica that asked for `resources`.

    Raises:
        ConfigError: it asked for a GPU, and torch sees none.
    """
    if not resources.num_gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"resources.num_gpus: {resources.num_gpus:g} was asked for, but torch sees no GPU on this node."
        )
    return "cuda"
