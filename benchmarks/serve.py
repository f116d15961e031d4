"""`evaclip serve` under load: many clients, how long they wait, and whether answers are those that one alone gets."""

import http.client
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.machine import byline
from evaclip.factory import create_model
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import describe
from evaclip.runtime.store import Row, Store

PICTURES, SIDE = 32, 256
WORDS = ("a red bicycle", "two cats on a sofa", "snow", "a house by the sea at night", "a dog that runs")
_BOUNDARY = "----evaclip"


@dataclass
class Answers:
    """Milliseconds of all answers, statuses that aren't 200, and how far embeddings are from those made one by one."""

    waited: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    apart: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Question:
    path: str
    body: bytes
    kind: str
    expected: np.ndarray


def measure(model: str, clients: int, seconds: float) -> Answers:
    """Serves a store of random pictures in a process of its own, and asks it.

    Each client asks for a picture's embedding or a text's, again and again.
    """
    with tempfile.TemporaryDirectory() as folder:
        encoder = _random_encoder(model, Path(folder))
        files = _pictures()
        embeddings = np.concatenate([encoder.images([file]).numpy() for file in files])
        given = {"given": f"{model}:{folder}/random.safetensors", **describe(encoder)}
        with Store.create(Path(folder) / "store", given) as store:
            store.add(embeddings, [Row(str(number), "") for number in range(len(files))])
        questions = [_picture(file, embedding) for file, embedding in zip(files, embeddings, strict=True)]
        questions += [_text(text, encoder.texts(text)[0].numpy()) for text in WORDS * (PICTURES // len(WORDS))]
        with _served(Path(folder) / "store") as port:
            connect = partial(http.client.HTTPConnection, "127.0.0.1", port, timeout=60)
            return _ask(clients, seconds, connect, questions)


def show(model: str, clients: int, found: Answers) -> None:
    """One paragraph."""
    half, most, nearly = np.percentile(found.waited or [float("nan")], (50, 95, 99))
    Console().print(
        f"{model}, {clients} clients, {found.seconds:.0f} s: {len(found.waited):,} answers,"
        f" {len(found.waited) / found.seconds:.1f}/s; p50 {half:.0f} ms, p95 {most:.0f} ms, p99 {nearly:.0f} ms;"
        f" {len(found.errors)} errors {sorted(set(found.errors))}; embeddings differ from those made one by one by"
        f" {found.apart:.1e} at most\n{byline(torch.device('cpu'))}",
        highlight=False,
    )


def _random_encoder(name: str, folder: Path) -> Encoder:
    torch.manual_seed(0)
    save_file(create_model(name).state_dict(), folder / "random.safetensors")
    return Encoder(f"{name}:{folder}/random.safetensors", device="cpu", precision="fp32")


def _pictures() -> list[bytes]:
    draw, files = np.random.default_rng(0), []
    for _ in range(PICTURES):
        small = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((SIDE, SIDE)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def _picture(file: bytes, expected: np.ndarray) -> _Question:
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + file + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return _Question("/embed/image", body, f"multipart/form-data; boundary={_BOUNDARY}", expected)


def _text(text: str, expected: np.ndarray) -> _Question:
    body = urllib.parse.urlencode({"text": text}).encode()
    return _Question("/embed/text", body, "application/x-www-form-urlencoded", expected)


@contextmanager
def _served(store: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "evaclip", "serve", str(store), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if line.startswith("open ")), None)
            if line is None:
                raise RuntimeError("the server didn't start")
            yield int(line.split()[1].rpartition(":")[2])
        finally:
            server.terminate()


def _ask(
    clients: int, seconds: float, connect: Callable[[], http.client.HTTPConnection], questions: list[_Question]
) -> Answers:
    found, lock, began = Answers(), threading.Lock(), time.perf_counter()

    def client(seed: int) -> None:
        draw, connection = random.Random(seed), connect()
        while time.perf_counter() - began < seconds:
            question, start = draw.choice(questions), time.perf_counter()
            try:
                connection.request("POST", question.path, question.body, {"Content-Type": question.kind})
                response = connection.getresponse()
                answer, status = response.read(), str(response.status)
            except OSError as exc:
                status = type(exc).__name__
                connection.close()
            waited = 1e3 * (time.perf_counter() - start)
            with lock:
                if status == "200":
                    embedding = json.loads(answer)["embeddings"][0]
                    found.waited.append(waited)
                    found.apart = max(found.apart, float(np.abs(embedding - question.expected).max()))
                else:
                    found.errors.append(status)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - began
    return found
