"""The data path: every Serve deployment a request passes through."""
