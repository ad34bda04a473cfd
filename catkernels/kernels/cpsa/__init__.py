"""The CPSA kernels and their launchers."""
