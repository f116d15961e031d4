"""Screenshot the search page of a running server with the demo's store.

python tools/screenshots.py http://127.0.0.1:8000 docs
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

WORDS = "red heart, heart suit, lips, red apple"
SHOTS = {
    "serve-light": ("light", (1200, 780), "person in a boat", False),
    "serve-dark": ("dark", (1200, 780), "red heart", True),
    "serve-phone": ("light", (390, 760), "blue heart", False),
}


def main(address: str, folder: Path) -> None:
    """Write one PNG per entry of SHOTS."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        for name, (scheme, (width, height), text, words) in SHOTS.items():
            page: Any = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(f"{address}/?text={text}")
            page.locator(".card").first.wait_for()
            if words:
                _compare(page, address)
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(600)
            image = Image.open(io.BytesIO(page.screenshot()))
            image.convert("RGB").quantize(256).save(folder / f"{name}.png", optimize=True)


def _compare(page: Any, address: str) -> None:
    data = page.request.get(address + page.locator(".card img").first.get_attribute("src")).body()
    file = {"name": "image.webp", "mimeType": "image/webp", "buffer": data}
    page.get_by_label("Search with an image").set_input_files(file)
    page.get_by_label("Which of these words?").fill(WORDS)
    page.keyboard.press("Enter")
    page.locator("#bars li").first.wait_for()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
