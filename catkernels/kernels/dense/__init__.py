"""The kernels of what a block has beside its attention: norms, MLP, linear layers, residuals."""
