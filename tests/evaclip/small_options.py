"""The model that most tests of the trainer train."""

from typing import Any

OPTIONS: dict[str, Any] = {
    "embed_dim": 16,
    "vision": {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4},
    "text": {"width": 16, "layers": 1, "heads": 2},
}

CLASSIFIER: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4}
"""Options of an image model of the same size."""
