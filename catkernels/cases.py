"""The calls that tests, benchmarks and the self-check share: shapes by name, inputs, tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from catkernels import reference
from catkernels.dropout import kept
from catkernels.ops import cpsa, ipsa
from catkernels.reference import ceil_div, num_patches

Inputs = dict[str, Tensor | None]

# The two streams of numbers that each seed has.
_INPUTS, _GRADIENTS = 0, 1


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
    def size(self) -> tuple[int, int, int, int]:
        """Of the map (B, H, W, C)."""
        return self.batch, self.height, self.width, self.channels

    @property
    def num_patches(self) -> int:
        return num_patches(self.height, self.width, self.patch_size)


def cat_stages(
    model: str = "small", image: int | tuple[int, int] = 224, batch: int = 1
) -> list[Shape]:
    """The four stages of CAT-T ("tiny") or of CAT-S and CAT-B ("small") as shapes.

    Image sides that are no multiple of 4 are padded at the bottom and right, as the model does.
    """
    channels, heads = {"tiny": (64, 2), "small": (96, 3)}[model]
    height, width = (image, image) if isinstance(image, int) else image
    height, width = ceil_div(height, 4), ceil_div(width, 4)
    stages = []
    for stage in range(4):
        name = f"{model}-stage{stage + 1}-{height}x{width}-b{batch}"
        stages.append(Shape(name, batch, height, width, channels << stage, heads << stage))
        height, width = ceil_div(height, 2), ceil_div(width, 2)
    return stages


def make_ipsa_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    table_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``qkv``, ``bias_table`` (in ``table_dtype``) and ``qkv_bias`` for `ipsa_attention`."""
    normal = normal_numbers(device, seed)
    sizes = {
        "qkv": (shape.batch, shape.height, shape.width, 3 * shape.channels),
        "bias_table": ((2 * shape.patch_size - 1) ** 2, shape.num_heads),
        "qkv_bias": (3 * shape.channels,),
    }
    inputs = {name: normal(size).to(device, dtype) for name, size in sizes.items()}
    inputs["bias_table"] = inputs["bias_table"].to(table_dtype or dtype)
    return inputs


def make_cpsa_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    weight_std: float | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``x`` and the four weights (std 1/N by default) for `cpsa_attention`."""
    drawn = normal_numbers(device, seed)
    tokens = shape.patch_size**2
    std = 1 / shape.patch_size if weight_std is None else weight_std

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (drawn(size) * std).to(device, dtype)

    return {
        "x": normal(shape.batch, shape.height, shape.width, shape.channels),
        "qkv_weight": normal(3 * tokens, tokens, std=std),
        "qkv_bias": normal(3 * tokens, std=std),
        "proj_weight": normal(tokens, tokens, std=std),
        "proj_bias": normal(tokens, std=std),
    }


@dataclass(frozen=True)
class IPSACase:
    """A call of IPSA: its shape, which inputs it lacks, and whether its table stays in float32."""

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
    mixed: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        table_dtype = torch.float32 if self.mixed else dtype
        inputs = make_ipsa_inputs(self.shape, dtype, device, table_dtype=table_dtype, seed=seed)
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
        return cast(
            Tensor,
            reference.ipsa_attention(
                qkv,
                bias_table,
                num_heads=self.num_heads,
                patch_size=self.patch_size,
                scale=self.scale,
                qkv_bias=qkv_bias,
                dropout_p=self.dropout_p,
            ),
        )

    def kept(self, seed: int) -> Tensor:
        """Which weights the kernels keep: bool (B, windows, heads, N*N, N*N)."""
        windows = self.shape.num_patches
        tokens = self.patch_size**2
        keep = kept(seed, self.dropout_p, tokens, tokens, self.num_heads, self.batch * windows)
        return keep.unflatten(0, (self.batch, windows))

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]:
        return ipsa.unsupported_reasons(
            device=device,
            dtype=dtype,
            head_dim=self.head_dim,
            patch_size=self.patch_size,
            needs_grad=needs_grad,
        )

    @property
    def shape(self) -> Shape:
        channels = self.num_heads * self.head_dim
        sizes = (self.batch, self.height, self.width, channels, self.num_heads, self.patch_size)
        return Shape(self.name, *sizes)

    @property
    def padded(self) -> bool:
        return bool(self.height % self.patch_size or self.width % self.patch_size)


@dataclass(frozen=True)
class CPSACase:
    """A call of CPSA: its shape, which inputs it lacks, and whether its map stays in float32.

    Such a map, as under autocast, is rounded as it is read.
    """

    name: str
    batch: int
    height: int
    width: int
    channels: int
    patch_size: int = 7
    without: tuple[str, ...] = ()
    scale: float | None = None
    dropout_p: float = 0.0
    mixed: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        inputs = make_cpsa_inputs(self.shape, dtype, device, seed=seed)
        if self.mixed:
            inputs["x"] = inputs["x"].float()
        return inputs | dict.fromkeys(self.without)

    def attend(self, x: Tensor, *weights: Any) -> Tensor:
        """By the kernels. Of the four weights a bias may be None."""
        return cpsa.cpsa_attention(
            x,
            *weights,
            patch_size=self.patch_size,
            scale=1 / self.patch_size if self.scale is None else self.scale,
            dropout_p=self.dropout_p,
            dtype=weights[0].dtype,
        )

    def specified(self, x: Tensor, *weights: Any) -> Tensor:
        """By the reference."""
        return cast(
            Tensor,
            reference.cpsa_attention(
                x.to(weights[0].dtype),
                *weights,
                patch_size=self.patch_size,
                scale=self.scale,
                dropout_p=self.dropout_p,
            ),
        )

    def kept(self, seed: int) -> Tensor:
        """Which weights the kernels keep: bool (B, C, P, P)."""
        patches = self.shape.num_patches
        return kept(seed, self.dropout_p, patches, patches, self.channels, self.batch)

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]:
        return cpsa.unsupported_reasons(
            device=device,
            dtype=dtype,
            patch_size=self.patch_size,
            num_patches=self.shape.num_patches,
            needs_grad=needs_grad,
        )

    @property
    def shape(self) -> Shape:
        sizes = (self.batch, self.height, self.width, self.channels)
        return Shape(self.name, *sizes, num_heads=1, patch_size=self.patch_size)


def results(
    attend: Callable[..., Tensor], inputs: Inputs, grad_out: Tensor | None = None
) -> dict[str, Tensor]:
    """The output, and with a gradient of it the gradients of the inputs that are in it."""
    differentiate = grad_out is not None
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    leaves = {name: t.detach().requires_grad_(differentiate) for name, t in given.items()}
    out = attend(*(leaves.get(name) for name in inputs))
    if grad_out is None:
        return {"out": out}
    grads = torch.autograd.grad(
        out, list(leaves.values()), grad_out.to(out.dtype), allow_unused=True
    )
    gradients = {f"d{k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {"out": out.detach(), **gradients}


def random_grad(shape: Shape, like: Tensor, seed: int = 0) -> Tensor:
    """A gradient of a call's output, in the dtype and on the device of ``like``.

    Whatever the seeds, it shares no numbers with the inputs.
    """
    return normal_numbers(like.device, seed, _GRADIENTS)(shape.size).to(like)


def normal_numbers(
    device: torch.device | str, seed: int, stream: int = _INPUTS
) -> Callable[[tuple[int, ...]], Tensor]:
    """Of a size, normal numbers in float32, drawn on the device itself where it can draw any."""
    place = "cpu" if torch.device(device).type == "meta" else device
    generator = torch.Generator(place).manual_seed(2 * seed + stream)
    return functools.partial(torch.randn, generator=generator, device=place)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


def cpsa_case(
    height: int, width: int, channels: int, patch_size: int = 7, batch: int = 1
) -> CPSACase:
    """A call of CPSA, named by its sizes."""
    name = f"b{batch}-{height}x{width}-c{channels}-n{patch_size}"
    return CPSACase(name, batch, height, width, channels, patch_size)


IPSA_CASES = [
    IPSACase("plain", 2, 14, 7),
    IPSACase("padded", 1, 9, 10),
    IPSACase("padded-below", 1, 9, 14),
    IPSACase("padded-right", 2, 7, 9, num_heads=1),
    IPSACase("no-table", 1, 14, 7, without=("bias_table",)),
    IPSACase("no-qkv-bias", 1, 10, 9, num_heads=1, without=("qkv_bias",)),
    IPSACase("nothing-but-qkv", 1, 8, 7, without=("bias_table", "qkv_bias")),
    IPSACase("one-pixel", 1, 1, 1),
    IPSACase("one-window-wide", 3, 14, 7, num_heads=1),
    IPSACase("scale", 1, 14, 7, scale=0.5),
    IPSACase("negative-scale", 1, 7, 7, scale=-0.1),
    IPSACase("N1", 3, 9, 11, patch_size=1),
    IPSACase("N2", 3, 8, 10, patch_size=2),
    IPSACase("N2-padded", 3, 7, 9, patch_size=2),
    IPSACase("N3-padded", 4, 7, 10, patch_size=3),
    IPSACase("N4", 3, 8, 12, patch_size=4),
    IPSACase("N4-padded", 3, 7, 10, patch_size=4),
    IPSACase("N5-padded", 3, 9, 12, patch_size=5),
    IPSACase("N6-padded", 2, 9, 6, patch_size=6),
    IPSACase("N8", 1, 16, 8, patch_size=8),
    IPSACase("N8-padded", 1, 9, 10, patch_size=8, num_heads=1),
    IPSACase("D16", 1, 14, 7, head_dim=16),
    IPSACase("D24", 1, 9, 7, head_dim=24, num_heads=3),
    IPSACase("D48", 1, 9, 7, head_dim=48),
    IPSACase("D64", 1, 9, 7, head_dim=64),
    IPSACase("D96", 1, 9, 7, head_dim=96),
    IPSACase("D128", 1, 9, 7, head_dim=128),
]

# P = 1, 2, 3, 4, 6, 9, 12, 16, 25, 49, 56, 64, 90, 100
CPSA_PATCH_COUNTS = [
    cpsa_case(7, 7, 70, batch=2),
    cpsa_case(7, 14, 40),
    cpsa_case(21, 7, 16),
    cpsa_case(14, 14, 17, batch=2),
    cpsa_case(14, 21, 8),
    cpsa_case(21, 21, 9),
    cpsa_case(21, 28, 8),
    cpsa_case(28, 28, 11),
    cpsa_case(35, 35, 3),
    cpsa_case(49, 49, 2),
    cpsa_case(49, 56, 2),
    cpsa_case(56, 56, 9),
    cpsa_case(63, 70, 2),
    cpsa_case(70, 70, 1),
]
# 512 x 512 and 800 x 1333 images: the loops over blocks of queries and keys
CPSA_LARGE = [cpsa_case(133, 133, 1), cpsa_case(200, 334, 1)]
# 1x1 maps, maps one patch wide, padding on both sides, every patch size, C = 1
CPSA_ODD_SHAPES = [
    cpsa_case(1, 1, 3),
    cpsa_case(1, 30, 2),
    cpsa_case(30, 3, 9),
    cpsa_case(20, 13, 5, batch=2),
    cpsa_case(50, 64, 2),
    cpsa_case(3, 5, 64, patch_size=1),
    cpsa_case(6, 7, 9, patch_size=2),
    cpsa_case(9, 9, 8, patch_size=3),
    cpsa_case(8, 8, 1, patch_size=4),
    cpsa_case(11, 20, 3, patch_size=5),
    cpsa_case(12, 12, 5, patch_size=6),
    cpsa_case(17, 16, 4, patch_size=8),
]
