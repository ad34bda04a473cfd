"""What tests and benchmarks share: the model's shapes by name, input makers, the error budget."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catkernels.torch_state.precision import allows_tf32

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


@dataclass(frozen=True)
class Shape:
    """A problem for both attentions: a (batch, height, width, channels) map and its patches."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    num_heads: int
    patch_size: int = 7

    def __str__(self) -> str:
        return self.name

    @property
    def num_patches(self) -> int:
        return -(-self.height // self.patch_size) * -(-self.width // self.patch_size)


def cat_stages(model: str = "small", image: int | tuple[int, int] = 224, batch: int = 1):
    """The four stages of CAT-T ("tiny") or of CAT-S and CAT-B ("small") as shapes (cat.md's table).

    Image sides that are no multiple of 4 are padded at the bottom and right, as the model does.
    """
    channels, heads = {"tiny": (64, 2), "small": (96, 3)}[model]
    height, width = (image, image) if isinstance(image, int) else image
    height, width = -(-height // 4), -(-width // 4)
    stages = []
    for stage in range(4):
        name = f"{model}-stage{stage + 1}-{height}x{width}-b{batch}"
        stages.append(Shape(name, batch, height, width, channels << stage, heads << stage))
        height, width = -(-height // 2), -(-width // 2)
    return stages


def make_ipsa_inputs(
    shape: Shape, dtype=torch.float32, device="cpu", *, table_dtype=None, seed=0
) -> dict[str, Tensor]:
    """``qkv``, ``bias_table`` (in ``table_dtype``) and ``qkv_bias`` for `ipsa_attention`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "qkv": (shape.batch, shape.height, shape.width, 3 * shape.channels),
        "bias_table": ((2 * shape.patch_size - 1) ** 2, shape.num_heads),
        "qkv_bias": (3 * shape.channels,),
    }
    inputs = {
        name: torch.randn(size, generator=generator).to(device, dtype)
        for name, size in sizes.items()
    }
    inputs["bias_table"] = inputs["bias_table"].to(table_dtype or dtype)
    return inputs


def make_cpsa_inputs(
    shape: Shape, dtype=torch.float32, device="cpu", *, weight_std: float | None = None, seed=0
) -> dict[str, Tensor]:
    """``x`` and the four weights (std 1/N by default) for `cpsa_attention`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = shape.patch_size**2
    std = 1 / shape.patch_size if weight_std is None else weight_std

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(device, dtype)

    return {
        "x": normal(shape.batch, shape.height, shape.width, shape.channels),
        "qkv_weight": normal(3 * tokens, tokens, std=std),
        "qkv_bias": normal(3 * tokens, std=std),
        "proj_weight": normal(tokens, tokens, std=std),
        "proj_bias": normal(tokens, std=std),
    }


def assert_within_error_budget(
    actual: Tensor, same_dtype: Tensor, float64: Tensor, name: str = "result"
) -> None:
    """Assert that ``actual`` is about as close to the truth as plain PyTorch in its dtype is.

    Its error against ``float64`` may be twice that of ``same_dtype`` plus one rounding step of its
    dtype, both in the largest element and in the root mean square.

    Args:
        actual: the result under test.
        same_dtype: the reference computed in the dtype that ``actual`` was computed in.
        float64: the reference computed in float64 from the same (rounded) inputs.
        name: what the tensor is called in the failure's message.
    """
    assert actual.shape == float64.shape, f"{name}: {tuple(actual.shape)}, not {float64.shape}"
    assert float64.dtype == torch.float64, f"{name}: the truth is {float64.dtype}, not float64"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} not finite"
    eps = max(torch.finfo(t.dtype).eps for t in (actual, same_dtype))
    norms = {
        "largest": lambda t: t.abs().max(),
        "root mean square": lambda t: t.square().mean() ** 0.5,
    }
    for kind, norm in norms.items():
        error, eager = (norm(t.detach().double() - float64) for t in (actual, same_dtype))
        budget = 2 * eager + eps * norm(float64)
        assert error <= budget, (
            f"{name}: {kind} error {error:.3e} is over the budget of {budget:.3e} "
            f"(eager {eager:.3e}, magnitude {norm(float64):.3e})"
        )


def assert_draws_within_error_budget(
    draws: Iterable[dict[str, tuple[Tensor, Tensor, Tensor]]], label: str
) -> None:
    """Judge several draws of the same results together, each in units of its largest true value.

    In one small tensor the largest error of plain PyTorch is now and then tiny by luck.

    Args:
        draws: for each draw, by name, what `assert_within_error_budget` takes.
        label: what the draws are called in the failure's message.
    """
    pools = defaultdict(lambda: ([], [], []))
    for draw in draws:
        for name, results in draw.items():
            # a power of two: exact in every dtype
            unit = 2.0 ** results[2].abs().max().clamp_min(1e-30).log2().floor().item()
            for pool, result in zip(pools[name], results, strict=True):
                pool.append(result.flatten() / unit)
    assert pools, f"{label}: nothing was drawn"
    for name, pool in pools.items():
        assert_within_error_budget(*map(torch.cat, pool), f"{label}: {name}")


def tf32_products() -> contextlib.AbstractContextManager:
    """Where torch's setting allows TF32, a context in which plain PyTorch's products do use it.

    By itself PyTorch takes exact products for sizes that suit tensor cores badly, such as tokens of
    49 pixels, and is then more exact than the setting asks for.
    """
    return _TF32Products() if allows_tf32() else contextlib.nullcontext()


class _TF32Products(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
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
