"""A small model in which everything matters: rotation, biases, every head."""

import torch

from evaclip import create_model
from evaclip.model.clip import CLIP


def lively(**overrides: object) -> CLIP:
    """`tiny` with larger weights than training starts with, at which attention is nearly uniform."""
    torch.manual_seed(0)
    model = create_model("tiny", **overrides).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias") or "gamma" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
