"""How rows travel between routers and expert replicas."""
