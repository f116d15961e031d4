"""Training: configuration, recipes, the optimizer step and the loop around it."""
