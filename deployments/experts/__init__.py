"""One expert group: its weights, its feed-forward networks, its Serve deployment."""
