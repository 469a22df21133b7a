"""The OpenAI-compatible HTTP front: validation, chat templates, detokenisation, streaming."""
