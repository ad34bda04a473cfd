"""Calls of IPSA that its tests share, and how their results are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from catkernels import reference
from catkernels.ops import ipsa
from catkernels.testing import Shape, assert_draws_within_error_budget, make_ipsa_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("qkv", "bias_table", "qkv_bias")


@dataclass(frozen=True)
class Case:
    """A call: its shape, and which inputs it lacks."""

    name: str
    batch: int
    height: int
    width: int
    patch_size: int = 7
    num_heads: int = 2
    head_dim: int = 32
    without: tuple[str, ...] = ()
    scale: float | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: torch.device, seed=0) -> dict[str, Tensor]:
        channels = self.num_heads * self.head_dim
        sizes = (self.batch, self.height, self.width, channels, self.num_heads, self.patch_size)
        inputs = make_ipsa_inputs(Shape(self.name, *sizes), dtype, device, seed=seed)
        return inputs | dict.fromkeys(self.without)

    def attend(self, qkv: Tensor, bias_table: Tensor | None, qkv_bias: Tensor | None) -> Tensor:
        """By the kernels."""
        return ipsa.ipsa_attention(
            qkv,
            bias_table,
            qkv_bias,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            dropout_p=self.dropout_p,
        )

    def specified(self, qkv: Tensor, bias_table: Tensor | None, qkv_bias: Tensor | None) -> Tensor:
        """By the reference."""
        return reference.ipsa_attention(
            qkv,
            bias_table,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            scale=self.scale,
            qkv_bias=qkv_bias,
            dropout_p=self.dropout_p,
        )

    @property
    def padded(self) -> bool:
        return bool(self.height % self.patch_size or self.width % self.patch_size)


def results(attend, inputs: dict[str, Tensor | None], grad_out: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of the inputs that are in it."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    out = attend(*(leaves.get(name) for name in INPUTS))
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
    gradients = {f"d{k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {"out": out.detach(), **gradients}


def converted(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


def random_grad(case: Case, like: Tensor, seed: int = 0) -> Tensor:
    """A gradient of a case's output, in the dtype and on the device of ``like``."""
    size = (case.batch, case.height, case.width, case.num_heads * case.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(like)


def check(*draws: tuple[Case, dict[str, Tensor | None]]) -> None:
    """Compare outputs and all gradients with float64; plain PyTorch computes in qkv's dtype."""
    compared = []
    for seed, (case, inputs) in enumerate(draws):
        qkv = inputs["qkv"]
        grad_out = random_grad(case, qkv, seed)
        actual = results(case.attend, inputs, grad_out)
        same_dtype = results(case.specified, converted(inputs, qkv.dtype), grad_out)
        float64 = results(case.specified, converted(inputs, torch.float64), grad_out.double())
        assert actual.keys() == float64.keys()
        for name, result in actual.items():
            assert result.dtype == inputs.get(name.removeprefix("d"), qkv).dtype, name
        compared.append({name: (actual[name], same_dtype[name], float64[name]) for name in actual})
    assert_draws_within_error_budget(compared, str(draws[0][0]))


def draws(case: Case, dtype: torch.dtype, device: torch.device):
    """Inputs of one case, several of them where they cost nothing."""
    number = 4 if device.type == "cuda" else 1
    return [(case, case.inputs(dtype, device, seed=seed)) for seed in range(number)]


CASES = [
    Case("plain", 2, 14, 7),
    Case("padded", 1, 9, 10),
    Case("padded-below", 1, 9, 14),
    Case("padded-right", 2, 7, 9, num_heads=1),
    Case("no-table", 1, 14, 7, without=("bias_table",)),
    Case("no-qkv-bias", 1, 10, 9, num_heads=1, without=("qkv_bias",)),
    Case("nothing-but-qkv", 1, 8, 7, without=("bias_table", "qkv_bias")),
    Case("one-pixel", 1, 1, 1),
    Case("one-window-wide", 3, 14, 7, num_heads=1),
    Case("scale", 1, 14, 7, scale=0.5),
    Case("negative-scale", 1, 7, 7, scale=-0.1),
    Case("N1", 3, 9, 11, patch_size=1),
    Case("N2", 3, 8, 10, patch_size=2),
    Case("N2-padded", 3, 7, 9, patch_size=2),
    Case("N3-padded", 4, 7, 10, patch_size=3),
    Case("N4", 3, 8, 12, patch_size=4),
    Case("N4-padded", 3, 7, 10, patch_size=4),
    Case("N5-padded", 3, 9, 12, patch_size=5),
    Case("N6-padded", 2, 9, 6, patch_size=6),
    Case("N8", 1, 16, 8, patch_size=8),
    Case("N8-padded", 1, 9, 10, patch_size=8, num_heads=1),
    Case("D16", 1, 14, 7, head_dim=16),
    Case("D24", 1, 9, 7, head_dim=24, num_heads=3),
    Case("D48", 1, 9, 7, head_dim=48),
    Case("D64", 1, 9, 7, head_dim=64),
    Case("D96", 1, 9, 7, head_dim=96),
    Case("D128", 1, 9, 7, head_dim=128),
]
NAMED = {case.name: case for case in CASES}
PLAIN, PADDED, PACKED = NAMED["plain"], NAMED["padded"], NAMED["N4-padded"]
