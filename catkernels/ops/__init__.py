"""The operators as PyTorch sees them: schemas, fakes and autograd Functions. The kernels are
imported only when an operator runs."""
