"""What the API answers, whom, and what it refuses with which sentence."""

import asyncio
import base64
import os
import signal
import socket
import threading
from threading import Timer
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from image_files import as_file
from starlette.testclient import TestClient

from evaclip.commands.main import main
from evaclip.commands.serve import KEY_VARIABLE
from evaclip.runtime.store import Row, Store
from evaclip.serve import create_app
from evaclip.serve.limits import Guard, Limits


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


def test_client_disconnect_cancels_work():
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


def test_embed_routes_equal_encoder(client, encoder, pictures):
    files = [("image", as_file(picture)) for picture in pictures[:3]]
    found = client.post("/embed/image", files=files).json()["embeddings"]
    np.testing.assert_allclose(found, encoder.images(pictures[:3]), atol=1e-5)
    found = client.post("/embed/text", data={"text": ["a cat", "a red bicycle"]}).json()["embeddings"]
    np.testing.assert_allclose(found, encoder.texts(["a cat", "a red bicycle"]), atol=1e-5)


def test_search_adds_queries_and_subtracts_minus(client, encoder, store, pictures):
    picture = as_file(pictures[4])
    assert _rows(client.post("/search", files={"image": picture}))[0] == 4
    (hit,) = client.post("/search", data={"text": "a", "filter": "n=7"}).json()["results"]
    assert (hit["row"], hit["id"], hit["caption"], hit["metadata"]) == (7, "7.png", "picture 7", {"n": 7})
    answer = client.post("/search", files={"image": picture}, data={"text": "a", "minus": "b", "like": 3, "top": 5})
    a, b = encoder.texts(["a", "b"]).numpy()
    query = encoder.images([pictures[4]])[0].numpy() + a - b + store.embeddings[3]
    scores = store.embeddings.astype(np.float32) @ (query / np.linalg.norm(query))
    expected = [row for row in np.argsort(-scores).tolist() if row != 3][:5]
    assert _rows(answer) == expected
    np.testing.assert_allclose([hit["score"] for hit in answer.json()["results"]], scores[expected], atol=1e-4)


def test_label_route_probabilities(client, encoder, pictures):
    names = ["cat", "dog", "bicycle"]
    answer = client.post("/label", files={"image": as_file(pictures[0])}, data={"label": names})
    cosines = encoder.texts([f"a photo of a {name}" for name in names]) @ encoder.images([pictures[0]])[0]
    expected = dict(zip(names, (encoder.model.logit_scale.exp() * cosines).softmax(0).tolist(), strict=True))
    found = answer.json()["labels"]
    assert [label["probability"] for label in found] == pytest.approx(sorted(expected.values(), reverse=True))
    assert {label["label"]: label["probability"] for label in found} == pytest.approx(expected)


def test_label_route_of_siglip_model(store, encoder, pictures, monkeypatch):
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


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"text": "  "}, 422, "nothing to look for"),
        ({"text": "a", "minus": "a"}, 422, "have a direction"),
        ({"text": "a" * 1001}, 422, "1,001 characters; send 1,000 at most"),
        ({"text": "a", "top": "many"}, 422, "'top'"),
        ({"like": 99}, 404, "no row 99"),
        ({"text": "a", "filter": "n="}, 422, "where must be"),
        ({"txet": "a"}, 422, "'txet'"),
        ({"image": "no file"}, 422, "'image'"),
    ],
)
def test_search_route_wrong_fields(client, fields, status, words):
    assert words in _error(client.post("/search", data=fields), status)


def test_routes_wrong_requests(client, pictures):
    picture = as_file(pictures[0])
    assert "17 images; send 16" in _error(client.post("/embed/image", files=[("image", picture)] * 17), 422)
    assert "129 texts; send 128" in _error(client.post("/embed/text", data={"text": ["a"] * 129}), 422)
    label = {"files": {"image": picture}, "data": {"label": ["a"], "template": "a photo"}}
    assert "no place for the label" in _error(client.post("/label", **label), 422)
    assert "is not a readable image" in _error(client.post("/embed/image", files={"image": b"hello"}), 415)
    assert "16 MiB" in _error(client.post("/search", content=iter([bytes(9 << 20)] * 2)), 413)
    _error(client.post("/search", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}), 400)
    assert "are forms" in _error(client.post("/search", json={"text": "a"}), 415)
    refused = client.get("/search")
    _error(refused, 405)
    assert refused.headers["allow"] == "POST"
    _error(client.get("/nowhere"), 404)


def test_page_loads_no_other_hosts(client):
    for path in ("/", "/page.js", "/page.css", "/theme.css"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "https://" not in answer.text
    assert client.get("/docs").json()["paths"].keys() >= {"/search", "/label", "/embed/image", "/embed/text"}
    assert client.get("/redoc").status_code == 404


def test_head_equals_get_without_body(client):
    for path in ("/", "/page.js", "/about", "/healthz", "/thumbnail/2"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] != "0"
    assert client.head("/search").status_code == 405


def test_other_host_names_are_refused(store, encoder):
    with TestClient(create_app(store, encoder, hosts=("localhost", "[::1]", "*.example.com"))) as client:
        for host in ("localhost:80", "LOCALHOST", "[::1]:8000", "a.example.com"):
            assert client.get("/about", headers={"host": host}).status_code == 200
        for host in ("evil.example", "", "localhost.evil.example", "::1", "example.com"):
            for path in ("/about", "/healthz"):
                sentence = f"isn't called {host!r} here; ask for localhost, [::1], *.example.com"
                assert sentence in _error(client.get(path, headers={"host": host}), 400)


def test_metrics_route(client):
    client.post("/search", data={"text": "a"})
    client.get("/elsewhere")
    text = client.get("/metrics").text
    assert 'evaclip_requests_total{route="/search",status="200"}' in text
    assert 'evaclip_requests_total{route="other",status="404"}' in text
    assert 'evaclip_batch_size_count{kind="text"}' in text
    assert "evaclip_rows 12.0" in text


def test_api_key_is_required(store, encoder):
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


def test_overload_is_rejected(store, encoder, monkeypatch):
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


def test_slow_request_times_out(store, encoder, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(encoder, "texts", lambda texts: held.wait(10))
    with TestClient(create_app(store, encoder, limits=Limits(seconds=0.2))) as client:
        assert "more than 0.2 seconds" in _error(client.post("/embed/text", data={"text": "a"}), 503)
        assert client.get("/healthz").status_code == 200
        held.set()


def test_server_survives_encoder_error(store, encoder, monkeypatch):
    app = create_app(store, encoder)
    with TestClient(app, raise_server_exceptions=False) as client:
        with monkeypatch.context() as broken:
            broken.setattr(encoder, "texts", lambda texts: 1 / 0)
            assert "its log says why" in _error(client.post("/embed/text", data={"text": "a"}), 500)
        assert client.post("/embed/text", data={"text": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        (["--host", "example.com"], None, "lets other machines in, which needs a key"),
        ([], "short", "has 5 characters; expected 16 or more"),
        (["--api-key-file", "nowhere"], None, "nowhere can't be read"),
        (["--port", "70000"], None, "--port is 0 to 65535"),
        (["--delay", "-1"], None, "--delay 0 to 1000"),
        ([], None, "isn't a store"),
    ],
)
def test_serve_mistakes_are_one_line(arguments, key, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    assert main(["serve", "a.store", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_serve_port_in_use(store, capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr("evaclip.runtime.encoder.Encoder", lambda *args, **kwargs: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(store.folder), "--port", str(port)]) == 2
    assert f"error: cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("found", [True, False])
def test_serve_opens_browser_when_ready(found, store, encoder, capsys, monkeypatch):
    shown = []

    def browse(address):
        try:
            with urlopen(address) as page:
                shown.append((address, page.read()))
        finally:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr("evaclip.commands.serve._app", lambda *args: create_app(store, encoder))
    monkeypatch.setattr("webbrowser.open", browse)
    # Where nobody could press Ctrl-C, processes are started to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    unasked = Timer(60, os.kill, (os.getpid(), signal.SIGINT))
    unasked.start()
    assert main(["serve", "a.store", "--port", "0", "--open"]) == 130
    unasked.cancel()
    signal.signal(signal.SIGINT, before)
    ((address, page),) = shown
    assert b"Describe an image" in page
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"open {address} (Ctrl-C ends)"
    assert said[1:] == ([] if found else ["no browser was found here to open it"])
