"""The error budget: how near to the truth a result must be, whoever computed it.

No tolerance is picked by hand. Plain PyTorch in the same dtype says what rounding costs, float64
says what is true.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catkernels.torch_state.precision import allows_tf32

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda t: t.abs().max(),
    "root mean square": lambda t: t.square().mean() ** 0.5,
}


class OutOfBudget(AssertionError):
    """A result is further from the truth than its dtype excuses."""


def assert_within_error_budget(
    actual: Tensor, same_dtype: Tensor, float64: Tensor, name: str = "result"
) -> float:
    """Check that ``actual`` is about as close to the truth as plain PyTorch in its dtype is.

    Its error against ``float64`` may be twice that of ``same_dtype`` plus one rounding step of its
    dtype, both in the largest element and in the root mean square.

    Args:
        actual: the result under test.
        same_dtype: the reference computed in the dtype that ``actual`` was computed in.
        float64: the reference computed in float64 from the same (rounded) inputs.
        name: what the tensor is called in the failure's message.

    Returns:
        The share of the budget that the error takes, from 0 to 1.

    Raises:
        OutOfBudget: it is not; or it has another shape, or values that are not finite.
        ValueError: what it is judged by has two shapes, or the truth is not float64.
    """
    if float64.dtype != torch.float64 or same_dtype.shape != float64.shape:
        raise ValueError(
            f"{name}: plain PyTorch's result {tuple(same_dtype.shape)} and the truth "
            f"{tuple(float64.shape)} need one shape, and the truth float64, not {float64.dtype}"
        )
    if actual.shape != float64.shape:
        raise OutOfBudget(f"{name}: {tuple(actual.shape)}, not {tuple(float64.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not torch.isfinite(actual).all():
        raise OutOfBudget(f"{name}: {(~torch.isfinite(actual)).sum()} values are not finite")
    eps = max(torch.finfo(t.dtype).eps for t in (actual, same_dtype))
    share = 0.0
    for kind, norm in NORMS.items():
        error, eager = (norm(t.detach().double() - float64) for t in (actual, same_dtype))
        budget = 2 * eager + eps * norm(float64)
        # written so that a comparison with NaN is a failure
        if not error <= budget:
            raise OutOfBudget(
                f"{name}: {kind} error {error:.3e} is over the budget of {budget:.3e} "
                f"(eager {eager:.3e}, magnitude {norm(float64):.3e})"
            )
        if error > 0:
            share = max(share, (error / budget).item())
    return share


def assert_draws_within_error_budget(
    draws: Iterable[dict[str, tuple[Tensor, Tensor, Tensor]]], label: str
) -> float:
    """Judge several draws of the same results together, each in units of its largest true value.

    In one small tensor the largest error of plain PyTorch is now and then tiny by luck.

    Args:
        draws: for each draw, by name, what `assert_within_error_budget` takes.
        label: what the draws are called in the failure's message.

    Returns:
        The largest share of a result's budget that its error takes, from 0 to 1.

    Raises:
        OutOfBudget: a result is over it.
        ValueError: nothing was drawn, or the tensors cannot be compared.
    """
    pools: dict[str, tuple[list[Tensor], ...]] = defaultdict(lambda: ([], [], []))
    for draw in draws:
        for name, results in draw.items():
            # a power of two: exact in every dtype
            unit = 2.0 ** results[2].abs().max().clamp_min(1e-30).log2().floor().item()
            for pool, result in zip(pools[name], results, strict=True):
                pool.append(result.flatten() / unit)
    if not pools:
        raise ValueError(f"{label}: nothing was drawn")
    used = []
    for name, pooled in pools.items():
        actual, same_dtype, float64 = map(torch.cat, pooled)
        used.append(assert_within_error_budget(actual, same_dtype, float64, f"{label}: {name}"))
    return max(used)


def tf32_products() -> contextlib.AbstractContextManager[object]:
    """Where torch's setting allows TF32, a context in which plain PyTorch's products do use it.

    By itself PyTorch takes exact products for sizes that suit tensor cores badly, such as tokens of
    49 pixels, and is then more exact than the setting asks for.
    """
    if not allows_tf32():
        return contextlib.nullcontext()
    return _TF32Products()  # type: ignore[no-untyped-call]


class _TF32Products(TorchDispatchMode):
    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        # in inference mode what consists of products comes here whole
        with self:
            result = operator.decompose(*arguments, **options)
        if result is not NotImplemented:
            return result
        if operator.overloadpacket in PRODUCTS:
            *added, left, right = arguments
            arguments = (*added, _cut(left), _cut(right))
        return operator(*arguments, **options)


def _cut(operand: Tensor) -> Tensor:
    """Without the 13 bits that tensor cores do not read."""
    if operand.dtype != torch.float32:
        return operand
    return (operand.view(torch.int32) & ~0x1FFF).view(torch.float32)
