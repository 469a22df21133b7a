"""What the modules of failures share with the end-to-end ones: the whole model as the reference of every answer."""

from __future__ import annotations

from tests.e2e.conftest import whole_model as whole_model
