"""What PyTorch says about a call: its device, precision, transforms, modes, hooks and tensors."""
