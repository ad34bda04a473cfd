"""The operators as PyTorch sees them: schemas, fakes and autograd Functions. Triton is imported
only when an operator runs."""
