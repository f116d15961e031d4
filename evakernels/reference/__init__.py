"""What each op means, in plain PyTorch: one file per op family, for any device and any float dtype."""
