"""Every family that `accelerate` serves."""

from dropin_open_clip import OPEN_CLIP
from dropin_timm import TIMM
from dropin_transformers import TRANSFORMERS

FAMILIES = TIMM | TRANSFORMERS | OPEN_CLIP
