"""Fused Triton kernels for CAT, the Cross Attention Vision Transformer."""
