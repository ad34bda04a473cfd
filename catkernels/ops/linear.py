"""What joins a branch of a block to its input: the residual with DropPath's factor, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


def add_branch(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    """``x + factor branch``, each way in one pass over the map.

    Args:
        x: (B, .., C).
        branch: like x; under autocast in half precision.
        factor: (B,) in the dtype of ``branch``, what each image's branch is multiplied with. None:
            nothing is dropped.

    Returns:
        Like x.
    """
    if factor is None:
        return x + branch
    return _AddBranch.apply(x, branch, factor)


class _AddBranch(torch.autograd.Function):
    """`torch.addcmul` of mixed dtypes: autocast and autograd on their own would copy for those."""

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call, which takes as long as a launch
        x, branch, factor = inputs
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x, branch, per_image(factor, x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, factor = inputs
        ctx.dtype = branch.dtype
        ctx.save_for_backward(factor)

    @staticmethod
    def backward(ctx, grad):
        (factor,) = ctx.saved_tensors
        return grad, branch_gradient(grad, factor, ctx.dtype), None


def branch_gradient(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch in ``dtype``, from that of ``x + factor branch``."""
    if factor is None:
        return grad.to(dtype)
    if grad.dtype == dtype:
        return grad * per_image(factor, grad)
    return torch.mul(grad, per_image(factor, grad), out=torch.empty_like(grad, dtype=dtype))


def per_image(factor: Tensor, x: Tensor) -> Tensor:
    """A factor (B,) as one for each value of ``x`` (B, ..)."""
    return factor.view(-1, *(1,) * (x.dim() - 1))
