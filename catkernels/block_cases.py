"""The calls of what a block has beside its attention, as `catkernels.families` has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from catkernels import reference
from catkernels.cases import Inputs, Shape, normal_numbers
from catkernels.ops import cpsa_residual, linear, mlp, norm
from catkernels.torch_state.precision import compute_dtype

PATCH_SIZE = 7  # of CPSA's cases here


@dataclass(frozen=True)
class _RowsCase:
    """A norm, and linear layers behind it, with the residual around them.

    Attributes:
        mixed: as under autocast, the map, the norm and the biases in float32.
        drop_path: the probability of DropPath, which drops the first image's branch.
    """

    name: str
    batch: int
    height: int
    width: int
    channels: int
    mixed: bool = False
    drop_path: float = 0.0
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def layers(self) -> nn.Module:
        """The norm and the linear layers, without values.

        Called with a map and what each image's branch is multiplied with, they run the kernels.
        """
        raise NotImplementedError

    def factor(self, x: Tensor) -> Tensor | None:
        """What each image's branch is multiplied with, (B,)."""
        if not self.drop_path:
            return None
        image = torch.arange(self.batch, device=x.device)
        return (image > 0).to(compute_dtype(x)) / (1 - self.drop_path)

    def dropped(self, branch: Tensor) -> Tensor:
        """What DropPath makes of a branch."""
        factor = self.factor(branch)
        return branch if factor is None else branch * linear.per_image(factor, branch)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        normal = normal_numbers(device, seed)
        tensors = {"x": normal(self.shape.size) + 0.3}
        for name, like in self.layers.named_parameters():
            values = normal(tuple(like.shape))
            if name == "norm.weight":
                values = 1 + 0.2 * values
            else:
                values *= 0.3 if like.dim() == 1 else 1.5 * like.shape[1] ** -0.5
            tensors[name] = values
        half = {name for name, tensor in tensors.items() if tensor.dim() == 2 or not self.mixed}
        return {
            name: tensor.to(device, dtype if name in half else torch.float32)
            for name, tensor in tensors.items()
        }

    def attend(self, x: Tensor, *weights: Tensor) -> Tensor:
        """By the kernels."""
        layers = self.layers
        names = (name for name, _ in layers.named_parameters())
        parameters = dict(zip(names, weights, strict=True))
        with _autocast(x, weights):
            return functional_call(layers, parameters, (x, self.factor(x)))

    def kept(self, seed: int) -> Tensor:
        """No attention weights, of which all are kept."""
        return torch.ones((), dtype=torch.bool)

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]:
        return norm.unsupported_reasons(device=device, dtypes={dtype}, channels=self.channels)

    @property
    def shape(self) -> Shape:
        return Shape(self.name, self.batch, self.height, self.width, self.channels, num_heads=1)


def _autocast(x: Tensor, weights: tuple[Tensor, ...]) -> torch.autocast:
    """Autocast to the dtype of the matrices, where that is not the map's."""
    (dtype,) = {weight.dtype for weight in weights if weight.dim() == 2}
    return torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype)


class MLPCase(_RowsCase):
    """An MLP with its norm and residual, 4C hidden units: by one kernel, or else by several."""

    @property
    def layers(self) -> nn.Module:
        return _MLPLayers(self.channels)

    def specified(self, x: Tensor, *weights: Tensor) -> Tensor:
        """By PyTorch."""
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        with _autocast(x, weights):
            normed = F.layer_norm(x, (self.channels,), norm_weight, norm_bias)
            hidden = F.gelu(F.linear(normed, fc1_weight, fc1_bias))
            return x + self.dropped(F.linear(hidden, fc2_weight, fc2_bias))


class ProjectionCase(_RowsCase):
    """IPSA's norm and linear layers with the residual; its attention adds queries, keys, values."""

    @property
    def layers(self) -> nn.Module:
        return _ProjectionLayers(self.channels)

    def specified(self, x: Tensor, *weights: Tensor) -> Tensor:
        """By PyTorch."""
        norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = weights
        with _autocast(x, weights):
            normed = F.layer_norm(x, (self.channels,), norm_weight, norm_bias)
            attended = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, -1)).sum(-2)
            return x + self.dropped(F.linear(attended, proj_weight, proj_bias))

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]:
        return super().unsupported_reasons(device, dtype, needs_grad) + linear.joined_reasons(
            products=dtype, channels=self.channels, features=self.channels
        )


class JoinedCPSACase(_RowsCase):
    """CPSA in patches of 7 x 7 with its norm and residual, which has no backward pass."""

    @property
    def layers(self) -> nn.Module:
        return _JoinedCPSALayers(self.channels)

    def specified(self, x: Tensor, *weights: Tensor) -> Tensor:
        """By PyTorch."""
        norm_weight, norm_bias, *own = weights
        with _autocast(x, weights):
            normed = F.layer_norm(x, (self.channels,), norm_weight, norm_bias)
            attended = reference.cpsa_attention(normed, *own, patch_size=PATCH_SIZE)
            return x + self.dropped(cast(Tensor, attended))

    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]:
        reasons = super().unsupported_reasons(device, dtype, needs_grad)
        if needs_grad:
            reasons.append("CPSA joins its norm in inference alone")
        return reasons + cpsa_residual.joined_reasons(
            products=dtype,
            parameters={dtype},
            channels=self.channels,
            patch_size=PATCH_SIZE,
            num_patches=self.shape.num_patches,
        )


class NormCase(_RowsCase):
    """A norm with the residual around it, whose output PyTorch multiplies."""

    @property
    def layers(self) -> nn.Module:
        return _NormLayers(self.channels)

    def specified(self, x: Tensor, *weights: Tensor) -> Tensor:
        """By PyTorch."""
        norm_weight, norm_bias, weight = weights
        with _autocast(x, weights):
            normed = F.layer_norm(x, (self.channels,), norm_weight, norm_bias)
            return x + self.dropped(F.linear(normed, weight))


class _MLPLayers(nn.Module):
    """What `catkernels.ops.mlp` takes: a norm and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, device="meta")
        self.fc1 = nn.Linear(channels, 4 * channels, device="meta")
        self.fc2 = nn.Linear(4 * channels, channels, device="meta")

    def forward(self, x: Tensor, factor: Tensor | None) -> Tensor:
        together = mlp.fused_mlp
        if mlp.fused_reasons(products=compute_dtype(x), shape=self.fc1.weight.shape):
            together = mlp.split_mlp
        return together(x, self.norm, self.fc1, self.fc2, factor)


class _ProjectionLayers(nn.Module):
    """What `catkernels.ops.linear` takes: a norm and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, device="meta")
        self.qkv = nn.Linear(channels, 3 * channels, device="meta")
        self.proj = nn.Linear(channels, channels, device="meta")

    def forward(self, x: Tensor, factor: Tensor | None) -> Tensor:
        qkv, x = linear.norm_linear_residual(x, self.norm, self.qkv.weight, self.qkv.bias)
        attended = qkv.unflatten(-1, (3, -1)).sum(-2)
        return linear.linear_residual(x, attended, self.proj.weight, self.proj.bias, factor)


class _JoinedCPSALayers(nn.Module):
    """What `catkernels.ops.cpsa_residual` takes: a norm and two linear layers of patches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        pixels = PATCH_SIZE**2
        self.norm = nn.LayerNorm(channels, device="meta")
        self.qkv = nn.Linear(pixels, 3 * pixels, device="meta")
        self.proj = nn.Linear(pixels, pixels, device="meta")

    def forward(self, x: Tensor, factor: Tensor | None) -> Tensor:
        layers, size = (self.norm, self.qkv, self.proj), PATCH_SIZE
        return cpsa_residual.cpsa_residual(x, *layers, factor, patch_size=size, scale=1 / size)


class _NormLayers(nn.Module):
    """What `catkernels.ops.norm` takes, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, device="meta")
        self.linear = nn.Linear(channels, channels, bias=False, device="meta")

    def forward(self, x: Tensor, factor: Tensor | None) -> Tensor:
        normed, x = norm.norm_residual(x, self.norm)
        return linear.add_branch(x, self.linear(normed), factor)
