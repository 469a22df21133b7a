"""The memory of tensors as numpy arrays, which index and copy small things at a fraction of torch's price per call."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[Any]


def as_words(tensor: Tensor) -> Words:
    """The memory of a CPU tensor as an array; integers of its width for bfloat16, which numpy does not know."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@cache
def word_type(dtype: torch.dtype) -> np.dtype[Any]:
    """What `as_words` makes of `dtype`."""
    return as_words(torch.empty(0, dtype=dtype)).dtype
