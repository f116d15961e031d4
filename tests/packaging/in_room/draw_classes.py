"""Two folders of pictures, as a data set whose classes are folders."""

import sys
from pathlib import Path

from PIL import Image

for color in ("red", "blue"):
    folder = Path(sys.argv[1], color)
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 30 + number), color).save(folder / f"{number}.png")
