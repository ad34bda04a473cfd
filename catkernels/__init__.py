"""Fused Triton kernels for CAT, the Cross Attention Vision Transformer."""

from catkernels.block import CATBlock
from catkernels.cat import CAT, cat_base, cat_small, cat_tiny
from catkernels.functional import cpsa_attention, ipsa_attention, unsupported_reasons
from catkernels.modules import CPSA, IPSA

__version__ = "0.1.0"

__all__ = [
    "CAT",
    "CPSA",
    "IPSA",
    "CATBlock",
    "cat_base",
    "cat_small",
    "cat_tiny",
    "cpsa_attention",
    "ipsa_attention",
    "unsupported_reasons",
]
