"""The page in a real browser: search, a dropped or pasted image, more like a result, labels for an image, keys."""

import threading
import time

import pytest
import uvicorn
from image_files import as_file

from evaclip.serve import create_app

pytestmark = pytest.mark.exhaustive
DROP = """([bytes, name, type]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""

PASTE = """([bytes, type]) => {
    const data = new DataTransfer();
    data.items.add("text next to the image", "text/plain");
    data.items.add(new File([new Uint8Array(bytes)], "image.png", {type}));
    const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
    return document.activeElement.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def address(store, encoder):
    server = uvicorn.Server(uvicorn.Config(create_app(store, encoder), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser, address, request):
    """The page, which may load from its server only, and whose errors fail the test."""
    complaints = []
    size = getattr(request, "param", (1280, 900))
    with browser.new_context(viewport={"width": size[0], "height": size[1]}) as context:
        opened = context.new_page()
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("console", lambda said: "the server responded" in said.text or complaints.append(said.text))
        own = (address, "blob:", "data:")
        opened.on("request", lambda sent: sent.url.startswith(own) or complaints.append(sent.url))
        opened.goto(address)
        yield opened
    assert complaints == []


def _search(page, text):
    page.get_by_label("What to look for").fill(text)
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()


def test_page_search_shows_captions_and_scores(page):
    assert page.get_by_text("Search images by content.").is_visible()
    _search(page, "a red bicycle")
    assert page.locator(".card").count() == 12
    assert "text=a+red+bicycle" in page.url
    shown = page.locator(".card img").evaluate_all("all => all.map(one => [one.alt, one.complete && one.naturalWidth])")
    assert all(alt for alt, _ in shown)
    scores = [float(score) for score in page.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert page.get_by_role("status").first.inner_text().startswith("The nearest 12 images")
    page.reload()
    page.locator(".card").first.wait_for()
    assert page.get_by_label("What to look for").input_value() == "a red bicycle"


def test_page_dropped_image_gets_labels(page, pictures):
    page.evaluate(DROP, [list(as_file(pictures[5])), "five.png", "image/png"])
    page.locator(".card").first.wait_for()
    assert page.locator(".caption").first.inner_text() == "picture 5"
    page.get_by_label("Which of these words?").fill("cat, dog, bicycle")
    page.keyboard.press("Enter")
    page.locator("#bars li").first.wait_for()
    shares = page.locator("#bars li span:nth-child(2)").all_inner_texts()
    assert len(shares) == 3
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=0.2)
    page.get_by_label("Search without this image").click()
    assert page.get_by_text("Search images by content.").is_visible()


def test_page_pasted_image_is_searched(page, pictures):
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.evaluate(PASTE, [list(as_file(pictures[9])), "image/png"]) is False
    page.get_by_text("Your image", exact=True).wait_for()
    page.locator(".card").first.wait_for()
    assert page.locator(".caption").first.inner_text() == "picture 9"
    # Text is the search box's own.
    assert page.evaluate(PASTE, [[104, 105], "text/plain"]) is True


def test_page_click_shows_similar_images(page):
    _search(page, "a")
    name = page.locator(".caption").nth(3).inner_text()
    page.locator(".card").nth(3).click()
    page.get_by_text("More like this", exact=True).wait_for()
    page.get_by_text("The nearest 11 images").wait_for()
    assert name not in page.locator(".caption").all_inner_texts()
    page.go_back()
    page.get_by_text("The nearest 12 images").wait_for()


def test_page_keys_move_through_results(page):
    def focused():
        return page.evaluate("[...document.querySelectorAll('.card')].indexOf(document.activeElement)")

    _search(page, "a")
    page.keyboard.press("ArrowDown")
    assert focused() == 0
    columns = page.evaluate("getComputedStyle(results).gridTemplateColumns.split(' ').length")
    for key, expected in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowUp", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert focused() == expected
    page.keyboard.press("Enter")
    page.get_by_text("More like this", exact=True).wait_for()
    page.keyboard.press("Escape")
    assert page.get_by_text("Search images by content.").is_visible()
    assert page.evaluate("document.activeElement.id") == "text"


def test_page_shows_errors(page):
    page.get_by_text("Narrow it down").click()
    page.get_by_label("Only where").fill("n=")
    page.get_by_label("What to look for").fill("a")
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("The search can't be made: where must be")
    page.evaluate(DROP, [[1, 2, 3], "broken.png", "image/png"])
    page.get_by_text("is not a readable image").wait_for()
    page.evaluate(DROP, [[1, 2, 3], "notes.txt", "text/plain"])
    page.get_by_text("notes.txt is not an image").wait_for()
