"""A program as a user of the package writes it, for type checkers only: every public name, typed.

Where a checker has to object it is told to pass over that; mypy then objects to what is not needed.
"""

from __future__ import annotations

from torch import Tensor, nn

import catkernels
from catkernels import (
    CAT,
    CPSA,
    IPSA,
    BlockReport,
    CATBlock,
    LoadReport,
    PatchReport,
    cat_base,
    cat_small,
    cat_tiny,
    cpsa_attention,
    ipsa_attention,
    load_checkpoint,
    patch,
    unpatch,
    unsupported_reasons,
)


def attentions(qkv: Tensor, table: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = ipsa_attention(qkv, table, num_heads=3, patch_size=7, backend="reference")
    y, maps = ipsa_attention(qkv, table, num_heads=3, patch_size=7, return_attention=True)
    z: Tensor = cpsa_attention(x, weight, None, weight, None, patch_size=(7, 7), dropout_p=0.1)
    z, more = cpsa_attention(x, weight, None, weight, None, patch_size=7, return_attention=True)
    reasons: list[str] = unsupported_reasons(ipsa_attention, qkv, table, num_heads=3, patch_size=7)
    return y + z if not reasons else maps.sum() + more.sum()


def either(qkv: Tensor, wanted: bool) -> Tensor:
    result = ipsa_attention(qkv, None, num_heads=3, patch_size=7, return_attention=wanted)
    return result if isinstance(result, Tensor) else result[0]


def models() -> list[nn.Module]:
    own: CAT = CAT(embed_dim=64, depths=(1, 1), num_heads=(2, 4), backend="auto")
    backbone = cat_small(out_indices=(0, 1, 2, 3), drop_path_rate=0.3)
    return [own, backbone, cat_tiny(num_classes=10), cat_base(img_size=(384, 384))]


def layers(x: Tensor) -> Tensor:
    x = IPSA(dim=96, patch_size=7, num_heads=3)(x)
    x = CPSA(patch_size=7)(x)
    y: Tensor = CATBlock(96, 3, attn_type="cpsa")(x)
    return y


def patched(model: nn.Module) -> str:
    report: PatchReport = patch(model, backend="auto")
    blocks: tuple[BlockReport, ...] = report.blocks
    restored: list[str] = unpatch(model)
    loaded: LoadReport = load_checkpoint(cat_small(), "cat_small.pth")
    return f"{report} {blocks[0].name} {restored} {loaded} {catkernels.__version__}"


def mistakes(x: Tensor) -> None:
    cat_small(num_clases=10)  # type: ignore[call-arg]
    cat_tiny(depths=3)  # type: ignore[arg-type]
    IPSA(dim=96, patch_sise=7)  # type: ignore[call-arg]
    ipsa_attention(x, num_heads=3, patch_size=7)  # type: ignore[call-overload]
    ipsa_attention(x, None, num_heads=3, patch_size=7, backend="gpu")  # type: ignore[call-overload]
    cpsa_attention(x, x, None, x, None, patch_size=7.5)  # type: ignore[call-overload]
    patch(CAT(), backend="fast")  # type: ignore[arg-type]
