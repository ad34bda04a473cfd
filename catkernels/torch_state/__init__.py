"""What PyTorch says about a call: its device, precision and function transforms."""
