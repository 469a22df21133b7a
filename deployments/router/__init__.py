"""The router: everything of the model but its routed experts, and the engine that batches requests through it."""
