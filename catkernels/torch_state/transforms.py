"""Which of PyTorch's function transforms, and whether a tracer, a call is made within.

The answers are constants of a graph, which only serves the transforms that it was made within.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from catkernels.torch_state.graphs import constant_in_graphs

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@constant_in_graphs
def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or is_forward_mode()


@constant_in_graphs
def is_forward_mode() -> bool:
    """Whether tensors may carry tangents, by `torch.func.jvp` and its kin or by a dual level."""
    return forward_ad._current_level >= 0


@constant_in_graphs
def is_vmap() -> bool:
    """Whether `torch.func.vmap` is among the transforms at work."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(transform.key() == functorch.TransformType.Vmap for transform in stack)


@constant_in_graphs
def is_tracing() -> bool:
    """Whether `torch.jit.trace` records a call, as TensorBoard's graphs and old ONNX exports do."""
    return torch._C._is_tracing()


def transform_reasons(needs_grad: bool) -> list[str]:
    """Why kernels with no more than a backward pass cannot serve here; empty where they can."""
    reasons = []
    if is_tracing():
        # it would silently lose their gradients
        reasons.append("torch.jit.trace: it cannot record their backward pass, torch.export can")
    if is_forward_mode():
        reasons.append("forward-mode differentiation: the kernels only have a backward pass")
    if needs_grad and is_vmap():
        reasons.append("gradients under torch.func.vmap: the kernels' have no batching rule")
    return reasons


def known_to_need_grad(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor, if any, such that its ``requires_grad`` is true to what is differentiated.

    Compiled, the very arguments of `torch.func.grad` deny that they need a gradient, and so would
    silently get zero; what is made of them says the truth.
    """
    if isinstance(tensor, Tensor) and torch.compiler.is_dynamo_compiling() and is_transformed():
        return tensor.view_as(tensor)
    return tensor
