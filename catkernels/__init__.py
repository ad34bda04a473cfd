"""Fused Triton kernels for CAT, the Cross Attention Vision Transformer."""

from catkernels.block import CATBlock
from catkernels.cat import CAT, cat_base, cat_small, cat_tiny
from catkernels.checkpoint import LoadReport, load_checkpoint
from catkernels.functional import cpsa_attention, ipsa_attention, unsupported_reasons
from catkernels.modules import CPSA, IPSA
from catkernels.patching.patch import patch, unpatch
from catkernels.patching.report import BlockReport, PatchReport

__version__ = "0.1.0"

__all__ = [
    "CAT",
    "CPSA",
    "IPSA",
    "BlockReport",
    "CATBlock",
    "LoadReport",
    "PatchReport",
    "cat_base",
    "cat_small",
    "cat_tiny",
    "cpsa_attention",
    "ipsa_attention",
    "load_checkpoint",
    "patch",
    "unpatch",
    "unsupported_reasons",
]
