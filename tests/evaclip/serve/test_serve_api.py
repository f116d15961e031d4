"""What the API answers, whom, and what it refuses with which sentence."""

import asyncio
import base64
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from serve_files import as_file
from starlette.testclient import TestClient

from evaclip.runtime.store import Row, Store
from evaclip.serve import create_app
from evaclip.serve.limits import Guard, Limits, Rejected, decode


@pytest.fixture(scope="module")
def client(store, encoder):
    with TestClient(create_app(store, encoder, hosts=("localhost",)), base_url="http://localhost") as opened:
        yield opened


def _rows(answer):
    assert answer.status_code == 200, answer.text
    return [hit["row"] for hit in answer.json()["results"]]


def _error(answer, status):
    assert answer.status_code == status, answer.text
    (sentence,) = answer.json().values()
    assert sentence.endswith(".")
    return sentence


def test_embeddings_are_those_of_the_encoder(client, encoder, pictures):
    files = [("image", as_file(picture)) for picture in pictures[:3]]
    found = client.post("/embed/image", files=files).json()["embeddings"]
    np.testing.assert_allclose(found, encoder.images(pictures[:3]), atol=1e-5)
    found = client.post("/embed/text", data={"text": ["a cat", "a red bicycle"]}).json()["embeddings"]
    np.testing.assert_allclose(found, encoder.texts(["a cat", "a red bicycle"]), atol=1e-5)


def test_search_adds_queries_and_subtracts_minus(client, encoder, store, pictures):
    picture = as_file(pictures[4])
    assert _rows(client.post("/search", files={"image": picture}))[0] == 4
    answer = client.post("/search", files={"image": picture}, data={"text": "a", "minus": "b", "like": 3, "top": 5})
    a, b = encoder.texts(["a", "b"]).numpy()
    query = encoder.images([pictures[4]])[0].numpy() + a - b + store.embeddings[3]
    scores = store.embeddings.astype(np.float32) @ (query / np.linalg.norm(query))
    expected = [row for row in np.argsort(-scores).tolist() if row != 3][:5]
    assert _rows(answer) == expected
    np.testing.assert_allclose([hit["score"] for hit in answer.json()["results"]], scores[expected], atol=1e-4)


def test_a_hit_has_what_the_store_has(client):
    (hit,) = client.post("/search", data={"text": "a", "filter": "n=7"}).json()["results"]
    assert (hit["row"], hit["id"], hit["caption"], hit["metadata"]) == (7, "7.png", "picture 7", {"n": 7})
    assert hit["thumbnail"] == "/thumbnail/7?v=c7"


def test_labels_have_probabilities(client, encoder, pictures):
    names = ["cat", "dog", "bicycle"]
    answer = client.post("/label", files={"image": as_file(pictures[0])}, data={"label": names})
    cosines = encoder.texts([f"a photo of a {name}" for name in names]) @ encoder.images([pictures[0]])[0]
    expected = dict(zip(names, (encoder.model.logit_scale.exp() * cosines).softmax(0).tolist(), strict=True))
    found = answer.json()["labels"]
    assert [label["probability"] for label in found] == pytest.approx(sorted(expected.values(), reverse=True))
    assert {label["label"]: label["probability"] for label in found} == pytest.approx(expected)


def test_labels_of_a_siglip_model_are_independent(store, encoder, pictures, monkeypatch):
    monkeypatch.setattr(encoder.model, "logit_bias", torch.tensor(-3.0))
    cosine = float(encoder.texts(["a photo of a cat"])[0] @ encoder.images([pictures[0]])[0])
    with TestClient(create_app(store, encoder, hosts=("localhost",)), base_url="http://localhost") as client:
        answer = client.post("/label", files={"image": as_file(pictures[0])}, data={"label": ["cat", "dog"]})
    found = {label["label"]: label["probability"] for label in answer.json()["labels"]}
    expected = (encoder.model.logit_scale.exp() * cosine - 3).sigmoid().item()
    assert found["cat"] == pytest.approx(expected, rel=1e-4)


def test_thumbnails_of_store_and_file(client, pictures):
    stored, made = client.get("/thumbnail/2"), client.get("/thumbnail/10")
    assert (stored.content, stored.headers["content-type"]) == (as_file(pictures[2]), "image/png")
    assert made.headers["content-type"] == "image/webp"
    assert "row 11" in _error(client.get("/thumbnail/11"), 404)
    for row in ("12", "-1", str(10**30)):
        assert f"no row {row}" in _error(client.get(f"/thumbnail/{row}"), 404)
    for path in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "0/../../rows.sqlite"):
        assert client.get(f"/thumbnail/{path}").status_code in (404, 422)


def test_server_follows_a_changing_store(store, encoder, pictures, tmp_path):
    rows = [Row(str(n), f"c{n}", thumbnail=as_file(pictures[n])) for n in range(3)]
    with Store.create(tmp_path / "store", store.model) as writer, Store.open(writer.folder) as reader:
        client = TestClient(create_app(reader, encoder))
        writer.add(encoder.images(pictures[:3]).numpy(), rows)
        assert client.get("/about").json()["pictures"] == 3
        hits = client.post("/search", data={"text": "a"}).json()["results"]
        address = next(hit["thumbnail"] for hit in hits if hit["row"] == 1)
        assert client.get(address).content == as_file(pictures[1])
        writer.remove(["1"])
        assert "evaclip_rows 2.0" in client.get("/metrics").text
        assert "search again" in _error(client.get(address), 404)


def test_a_number_that_no_row_can_have_finds_nothing(client):
    answer = client.post("/search", data={"text": "a", "filter": f"n={10**30}"})
    assert (answer.status_code, answer.json()["results"]) == (200, [])


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({}, 422, "nothing to look for"),
        ({"text": "  "}, 422, "nothing to look for"),
        ({"minus": "a"}, 422, "nothing to look for"),
        ({"text": "a", "minus": "a"}, 422, "have a direction"),
        ({"text": "a" * 1001}, 422, "1,001 characters; send 1,000 at most"),
        ({"text": "a", "top": 0}, 422, "'top' is 0; send 1 to 200"),
        ({"text": "a", "top": "many"}, 422, "'top'"),
        ({"like": 99}, 404, "no row 99"),
        ({"text": "a", "filter": "n="}, 422, "where must be"),
        ({"txet": "a"}, 422, "'txet'"),
        ({"image": "no file"}, 422, "'image'"),
    ],
)
def test_a_wrong_search_gets_a_sentence(client, fields, status, words):
    assert words in _error(client.post("/search", data=fields), status)


def test_other_wrong_requests_get_a_sentence(client, pictures):
    picture = as_file(pictures[0])
    assert "17 pictures; send 16" in _error(client.post("/embed/image", files=[("image", picture)] * 17), 422)
    assert "129 texts; send 128" in _error(client.post("/embed/text", data={"text": ["a"] * 129}), 422)
    label = {"files": {"image": picture}, "data": {"label": ["a"], "template": "a photo"}}
    assert "no place for the label" in _error(client.post("/label", **label), 422)
    assert "16 MiB" in _error(client.post("/search", content=bytes((16 << 20) + 1)), 413)
    assert "16 MiB" in _error(client.post("/search", content=iter([bytes(9 << 20)] * 2)), 413)
    _error(client.post("/search", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}), 400)
    assert "are forms" in _error(client.post("/search", json={"text": "a"}), 415)
    refused = client.get("/search")
    _error(refused, 405)
    assert refused.headers["allow"] == "POST"
    _error(client.get("/nowhere"), 404)


@pytest.mark.parametrize(
    ("data", "status"), [(b"", 415), (b"hello", 415), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415)]
)
def test_what_is_no_picture_is_refused(client, data, status):
    assert "no picture that can be read" in _error(client.post("/embed/image", files={"image": data}), status)


def test_bombs_are_refused_before_they_are_decoded(pictures):
    def reason(data, limits=None):
        with pytest.raises(Rejected) as caught:
            decode(data, limits or Limits())
        return caught.value.status, caught.value.reason

    status, sentence = reason(as_file(pictures[0]), Limits(pixels=1000))
    assert status == 413
    assert "40 x 48 pixels is too large; send one of 1,000 pixels at most" in sentence
    png = bytearray(as_file(pictures[0]))
    png[16:24] = (60_000).to_bytes(4) * 2  # the header's size; its checksum is wrong then, which Pillow tells first
    assert reason(bytes(png))[0] in (413, 415)
    scans = as_file(pictures[0], "JPEG") + b"\xff\xda" * 200
    assert "100 scans" in reason(scans)[1]


def test_noise_in_a_png_file_is_no_scan_of_a_jpeg():
    data = bytearray(as_file(Image.new("RGB", (8, 8)), "PNG"))
    scans = b"\xff\xda" * 200
    chunk = b"teXt" + scans
    data[-12:-12] = len(scans).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    assert decode(bytes(data), Limits()).size == (8, 8)


def test_the_page_loads_nothing_from_elsewhere(client):
    for path in ("/", "/page.js", "/page.css", "/theme.css"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "https://" not in answer.text
    assert client.get("/docs").json()["paths"].keys() >= {"/search", "/label", "/embed/image", "/embed/text"}
    assert client.get("/redoc").status_code == 404


def test_head_is_get_without_its_body(client):
    for path in ("/", "/page.js", "/about", "/healthz", "/thumbnail/2"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] != "0"
    assert client.head("/search").status_code == 405


def test_other_names_are_refused(store, encoder):
    with TestClient(create_app(store, encoder, hosts=("localhost", "[::1]", "*.example.com"))) as client:
        for host in ("localhost:80", "LOCALHOST", "[::1]:8000", "a.example.com"):
            assert client.get("/about", headers={"host": host}).status_code == 200
        for host in ("evil.example", "", "localhost.evil.example", "::1", "example.com"):
            for path in ("/about", "/healthz"):
                sentence = f"isn't called {host!r} here; ask for localhost, [::1], *.example.com"
                assert sentence in _error(client.get(path, headers={"host": host}), 400)


def test_counters(client):
    client.post("/search", data={"text": "a"})
    client.get("/elsewhere")
    text = client.get("/metrics").text
    assert 'evaclip_requests_total{route="/search",status="200"}' in text
    assert 'evaclip_requests_total{route="other",status="404"}' in text
    assert 'evaclip_batch_size_count{kind="text"}' in text
    assert "evaclip_rows 12.0" in text


def test_a_key_is_asked_for(store, encoder):
    with TestClient(create_app(store, encoder, key="a key of some length")) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        basic = base64.b64encode(b"anyone:a key of some length").decode()
        for given in ("Bearer a key of some length", f"Basic {basic}"):
            assert client.get("/about", headers={"authorization": given}).json()["pictures"] == 12
        wrong = ("", "Bearer", "Bearer wrong", "Bearer \u00e4", "Basic !", "Basic AAAA", "Other a key of some length")
        for given in wrong:
            refused = client.get("/about", headers={"authorization": given.encode("latin-1")})
            assert "API key" in _error(refused, 401)
            assert refused.headers["www-authenticate"].startswith("Basic ")
        assert client.get("/").status_code == client.get("/metrics").status_code == 401


def test_more_than_the_server_can_do_is_sent_away(store, encoder, monkeypatch):
    held, real = threading.Event(), encoder.texts
    monkeypatch.setattr(encoder, "texts", lambda texts: held.wait(10) and real(texts))
    with TestClient(create_app(store, encoder, limits=Limits(waiting=20))) as client:
        refused = client.post("/embed/text", data={"text": ["a"] * 50})
        assert "too much to do" in _error(refused, 503)
        assert refused.headers["retry-after"] == "1"
        # What had been let in of it doesn't wait any more.
        assert "evaclip_waiting 0.0" in client.get("/metrics").text
        held.set()
        assert client.post("/embed/text", data={"text": "a"}).status_code == 200
    with TestClient(create_app(store, encoder, limits=Limits(requests=0))) as client:
        assert "too much to do" in _error(client.post("/search", data={"text": "a"}), 503)


def test_what_takes_too_long_ends(store, encoder, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(encoder, "texts", lambda texts: held.wait(10))
    with TestClient(create_app(store, encoder, limits=Limits(seconds=0.2))) as client:
        assert "more than 0.2 seconds" in _error(client.post("/embed/text", data={"text": "a"}), 503)
        assert client.get("/healthz").status_code == 200
        held.set()


def test_a_failure_is_told_as_one_and_the_server_lives(store, encoder, monkeypatch):
    app = create_app(store, encoder)
    with TestClient(app, raise_server_exceptions=False) as client:
        with monkeypatch.context() as broken:
            broken.setattr(encoder, "texts", lambda texts: 1 / 0)
            assert "its log says why" in _error(client.post("/embed/text", data={"text": "a"}), 500)
        assert client.post("/embed/text", data={"text": "a"}).status_code == 200


def test_work_ends_when_nobody_waits_for_it():
    state, scope = [], {"type": "http", "path": "/", "headers": []}

    async def app(scope, receive, send):
        state.append((await receive())["body"])
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            state.append("cancelled")
            raise

    async def run():
        messages = [{"type": "http.request", "body": b"x", "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0.01)
            return messages.pop(0)

        await Guard(app, Limits())(scope, receive, None)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert state == [b"x", "cancelled"]


@pytest.mark.exhaustive
def test_many_clients_get_their_own_embeddings(store, encoder, pictures):
    """50 clients ask a server over the network for images and captions at the same time, without an error."""
    import httpx2  # the client that starlette's TestClient asks for
    import uvicorn

    texts = [f"picture {number}" for number in range(12)]
    expected = {"image": encoder.images(pictures).numpy(), "text": encoder.texts(texts).numpy()}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(store, encoder), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def ask(number):
            kind, row = ("image", "text")[number % 2], number % 12
            body = {"files": [("image", as_file(pictures[row]))]} if kind == "image" else {"data": {"text": texts[row]}}
            answer = httpx2.post(f"{address}/embed/{kind}", timeout=60, **body)
            assert answer.status_code == 200, answer.text
            return np.abs(answer.json()["embeddings"][0] - expected[kind][row]).max()

        try:
            with ThreadPoolExecutor(50) as clients:
                assert max(clients.map(ask, range(300))) < 1e-5
        finally:
            server.should_exit = True
            thread.join()
