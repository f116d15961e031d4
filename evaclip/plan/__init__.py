"""Memory, FLOPs and communication of a training step, before a GPU is rented."""
