"""How rows travel between routers and expert replicas."""

WIRE_VERSION = 2
"""Of the frames and the handshake; part of the model digest. Here, because the builder needs it without torch."""
