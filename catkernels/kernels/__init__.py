"""The Triton kernels and their launchers: the only folder that imports Triton."""
