"""EVA-CLIP's images for transformers: `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`.

`evaclip convert --to transformers` copies this file next to the weights.
"""

from typing import Any

from torchvision.transforms.v2.functional import center_crop
from transformers import CLIPImageProcessor


class EVACLIPImageProcessor(CLIPImageProcessor):
    """CLIP's image processor with the centre crop of torchvision, open_clip and evaclip.

    transformers rounds an odd excess down, torchvision to the nearest even number.
    """

    def center_crop(self, image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        """The centre of an image `[..., C, H, W]`, of `size.height` x `size.width` pixels."""
        return center_crop(image, [size.height, size.width])
