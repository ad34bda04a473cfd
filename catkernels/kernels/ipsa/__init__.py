"""The IPSA kernels and their launchers."""
