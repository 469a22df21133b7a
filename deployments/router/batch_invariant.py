"""Matrix products whose rows do not depend on how many rows there are: weights that multiply in tiles of fixed height.

A GEMM library picks its kernel, and with it the order of summation, by the number of rows: the same row gives other
last bits in a batch of 1, 4 or 40. Here every product with a weight of the model runs in tiles of `ROW_TILE` rows, the
last one padded with zeros, so the library always sees one shape; inside a tile a row's place does not matter
(measured for heights 4 to 32 in float32, bfloat16 and float16, and checked again at start-up by probe.py).
Element-wise kernels have the same trouble at the end of an array, where a scalar loop replaces the vector loop: the
step itself is therefore padded to whole tiles (backbone.py).

16-bit types are multiplied in float32 on a CPU and rounded once: the same rule, faster where the CPU has no 16-bit
arithmetic. The idea is Thinking Machines', "Defeating Nondeterminism in LLM Inference", 2025. Knows no model: it works
on any module whose two-dimensional parameters are its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UnsupportedModelError

ROW_TILE = 8

_SAME_MATRIX = {Tensor.to, Tensor.type, Tensor.float, Tensor.contiguous, Tensor.detach}
# A property reaches __torch_function__ as its getter.
_TRANSPOSES = {
    Tensor.t,
    Tensor.transpose,
    torch.t,
    torch.transpose,
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT")),
}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_OTHER_PRODUCTS = {torch.einsum, torch.bmm, torch.addmm, torch.baddbmm, torch.tensordot, torch.mv, Tensor.__rmatmul__}


class FixedRowParameter(nn.Parameter):
    """A weight [out, in] whose products with activations run in tiles of `ROW_TILE` rows.

    It replaces the parameter itself, so it catches `nn.Linear` and gates that call `F.linear` on a bare parameter
    alike, without a patch of torch and without a cost for any other operator.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Route products with this weight to `fixed_row_product`; a cast or transpose of it stays such a weight."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return fixed_row_linear(*args, **(kwargs or {}))
            if func in _PRODUCTS and isinstance(args[1], cls):
                return fixed_row_product(args[0], args[1])
            if func in _OTHER_PRODUCTS or func in _PRODUCTS:
                name = getattr(func, "__name__", str(func))
                raise UnsupportedModelError(f"router.batch_invariant: true: the model multiplies weights by {name}.")
            result = func(*args, **(kwargs or {}))
            if (func in _SAME_MATRIX or func in _TRANSPOSES) and isinstance(result, Tensor):
                return result.as_subclass(cls)
            return result


def fix_rows(model: nn.Module, skip: Callable[[str], bool]) -> None:
    """Replace every two-dimensional parameter of `model` in place, but those whose name `skip` accepts."""
    replaced: dict[int, FixedRowParameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.dim() != 2 or skip(f"{name}.{key}"):
                continue
            if id(parameter) not in replaced:
                fixed = parameter.detach().as_subclass(FixedRowParameter)
                replaced[id(parameter)] = cast(FixedRowParameter, fixed.requires_grad_(False))
            module.register_parameter(key, replaced[id(parameter)])


def fixed_row_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of rows [..., in] with weight [out, in], each row independent of the others, bit for bit."""
    return fixed_row_product(rows, weight.t(), bias)


def fixed_row_product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [..., in] times matrix [in, out] plus bias [out] -> [..., out], in the dtype of `rows`.

    >>> fixed_row_product(torch.ones(3, 2), torch.ones(2, 1)).tolist()
    [[2.0], [2.0], [2.0]]
    """
    work = torch.float32 if rows.device.type == "cpu" else rows.dtype
    flat = rows.reshape(-1, rows.shape[-1]).to(work)
    count = flat.shape[0]
    if count % ROW_TILE:
        flat = F.pad(flat, (0, 0, 0, -count % ROW_TILE))
    flat, matrix = flat.contiguous(), matrix.to(work)
    out = flat.new_empty(flat.shape[0], matrix.shape[1])
    for first in range(0, flat.shape[0], ROW_TILE):
        torch.mm(flat[first : first + ROW_TILE], matrix, out=out[first : first + ROW_TILE])
    if bias is not None:
        out += bias.to(work)
    return _spaced(out[:count], rows.dtype).view(*rows.shape[:-1], matrix.shape[1])


def _spaced(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` [T, N] in `dtype`; where N is no multiple of ROW_TILE, with a gap behind each row.

    Whole tiles of T times such an N (a gate with one output, 60 experts) need not be whole vectors, so that an
    element-wise kernel would change from its vector to its scalar loop in the middle. With gaps every row is alike.
    """
    width = out.shape[1]
    if width % ROW_TILE == 0:
        return out.to(dtype)
    gapped = torch.empty(out.shape[0], width + ROW_TILE - width % ROW_TILE, dtype=dtype, device=out.device)
    return gapped[:, :width].copy_(out)
