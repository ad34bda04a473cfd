"""The layers of CAT beside its attentions: what joins pixels and tokens, the MLP, stochastic depth.

Source: "CAT: Cross Attention in Vision Transformer" (arXiv 2106.05786), section 3.3. Parameters
have the names of the official implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catkernels.arguments import check_probability
from catkernels.modules import check_like_weight
from catkernels.torch_state.hooks import is_intercepted
from catkernels.torch_state.tensors import is_wrapper


class PatchEmbedding(nn.Module):
    """Each P x P patch of the image becomes a token: images (B, in, H, W) -> (B, H/P, W/P, C)."""

    def __init__(
        self,
        patch_emb_size: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        norm_layer: Callable[[int], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.patch_emb_size = patch_emb_size
        self.in_chans = in_chans
        self.proj = self._make_projection(embed_dim)
        self.norm = None if norm_layer is None else norm_layer(embed_dim)

    def _make_projection(self, embed_dim: int) -> nn.Conv2d:
        size = self.patch_emb_size
        return nn.Conv2d(self.in_chans, embed_dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            kind = type(images).__name__
            raise TypeError(f"images must be a tensor (B, {self.in_chans}, H, W), got {kind}")
        if images.dim() != 4 or images.shape[1] != self.in_chans or 0 in images.shape[2:]:
            raise ValueError(
                f"images must be (B, {self.in_chans}, H, W), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point, got {images.dtype}: divide by 255")
        # anything else takes what it takes
        proj = self.proj
        plain = type(proj) is nn.Conv2d and not is_intercepted(proj)
        if plain and not is_wrapper(proj.weight):
            check_like_weight("images", images, proj.weight)
        bottom = -images.shape[2] % self.patch_emb_size[0]
        right = -images.shape[3] % self.patch_emb_size[1]
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self._project(images).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)

    def _project(self, images: Tensor) -> Tensor:
        return self.proj(images)


class PatchSliceEmbedding(PatchEmbedding):
    """The embedding by slices: 2 x 2 neighbours become channels, twice, then a 1 x 1 convolution.

    The official code cannot run its own: it compares the sliced map's size with the image's.
    """

    def _make_projection(self, embed_dim: int) -> nn.Conv2d:
        if self.patch_emb_size != (4, 4):
            raise ValueError(f"slice_emb needs patch_emb_size=4, got {self.patch_emb_size}")
        return nn.Conv2d(16 * self.in_chans, embed_dim, kernel_size=1)

    def _project(self, images: Tensor) -> Tensor:
        for _ in range(2):
            images = torch.cat(_neighbours(images, dims=(2, 3)), 1)
        return self.proj(images)


class PatchProjection(nn.Module):
    """2 x 2 neighbours are joined and projected: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        return self.reduction(self.norm(torch.cat(_neighbours(x, dims=(1, 2)), -1)))


def add_position_embedding(x: Tensor, embedding: Tensor) -> Tensor:
    """A map (B, H, W, C) plus an embedding (1, C, h, w), which is resized where need be."""
    if embedding.shape[2:] != x.shape[1:3]:
        embedding = F.interpolate(embedding, x.shape[1:3], mode="bicubic")
    return x + embedding.permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``, (.., C) -> the same, with dropout after each of the two halves."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(check_probability("drop", drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the branch of an image with probability ``drop_prob``.

    Tensors (B, ..) keep their shape; what remains is scaled by ``1 / (1 - drop_prob)``.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = check_probability("drop_path", drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        mask = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def _neighbours(x: Tensor, dims: tuple[int, int]) -> list[Tensor]:
    """The four maps of every second (row, column), offset by (0,0), (1,0), (0,1) and (1,1)."""
    rows, columns = dims

    def every_second(offset_y: int, offset_x: int) -> Tensor:
        index = [slice(None)] * x.dim()
        index[rows], index[columns] = slice(offset_y, None, 2), slice(offset_x, None, 2)
        return x[tuple(index)]

    return [every_second(*offset) for offset in ((0, 0), (1, 0), (0, 1), (1, 1))]
