"""The state of every random generator of this process, as plain values that load with `weights_only=True`."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """States of Python, NumPy, torch's CPU generator and the device's."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Sets the states that `capture` returned."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_all(seed: int, stream: int) -> None:
    """Seeds every generator; different streams of one seed are independent."""
    python, numpy, torch_seed = np.random.SeedSequence([seed, stream]).generate_state(3, np.uint64)
    random.seed(int(python))
    np.random.seed(int(numpy) % 2**32)
    torch.manual_seed(int(torch_seed) % 2**63)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the states of Python's, NumPy's and torch's CPU generators are a function of `key`."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, np.uint32))
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
