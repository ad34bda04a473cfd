"""Calls of CPSA that its tests share, and how their results are judged."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels import reference
from catkernels.accuracy import assert_within_error_budget, tf32_products
from catkernels.cases import Shape, make_cpsa_inputs
from catkernels.ops import cpsa

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("out", "x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def make_inputs(shape: Shape, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    return make_cpsa_inputs(shape, dtype, DEVICE, **options)


def make_grad(inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.randn(inputs["x"].shape, device=DEVICE).to(dtype)


def with_gradients(attention, inputs: dict[str, Tensor], grad: Tensor, dtype, **options):
    """The output and the five gradients of ``attention`` with its inputs as ``dtype``."""
    leaves = {
        name: None if t is None else t.detach().to(dtype).requires_grad_()
        for name, t in inputs.items()
    }
    out = attention(**leaves, **options)
    used = [t for t in leaves.values() if t is not None]
    grads = iter(torch.autograd.grad(out, used, grad.to(out.dtype), materialize_grads=True))
    return [out, *(None if t is None else next(grads) for t in leaves.values())]


def kernels(*, dtype: torch.dtype):
    """`cpsa_attention` by the kernels, computing in ``dtype``."""

    def attention(*, patch_size: int, scale: float | None = None, dropout_p: float = 0.0, **leaves):
        scale = 1 / patch_size if scale is None else scale
        options = {"patch_size": patch_size, "scale": scale, "dropout_p": dropout_p}
        return cpsa.cpsa_attention(**leaves, **options, dtype=dtype)

    return attention


def assert_right(inputs: dict[str, Tensor], dtype: torch.dtype, *, grad=None, **options) -> None:
    """Assert that the kernels' output and gradients are within the error budget."""
    for name, results in compared(inputs, dtype, grad=grad, **options).items():
        assert_within_error_budget(*results, name)


def compared(
    inputs: dict[str, Tensor], dtype: torch.dtype, *, grad=None, **options
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients by the kernels, by plain PyTorch in ``dtype``, and in float64."""
    if grad is None:
        grad = make_grad(inputs, dtype)
    actual = with_gradients(kernels(dtype=dtype), inputs, grad, dtype, **options)
    with tf32_products():
        same_dtype = with_gradients(reference.cpsa_attention, inputs, grad, dtype, **options)
    float64 = with_gradients(reference.cpsa_attention, inputs, grad, torch.float64, **options)
    assert all(result is None or result.dtype == dtype for result in actual)
    everything = zip(NAMES, actual, same_dtype, float64, strict=True)
    return {name: tuple(results) for name, *results in everything if results[0] is not None}
