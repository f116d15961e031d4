"""Launch configurations: the look-up, what is shipped, and the search for better ones."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evakernels import backends, tuning
from evakernels.triton import FAMILIES
from evakernels.tuning.__main__ import main

pytest.importorskip("triton")
search = pytest.importorskip("evakernels.tuning.search")

ENTRIES = [
    tuning.entry(width=512, ROWS=4),
    tuning.entry(width=4096, ROWS=2),
    tuning.entry(width=4096, itemsize=4, ROWS=1),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables of its own: for 8.0, 9.0 and one GPU by name."""
    (tmp_path / "nvidia_a10g.json").write_text(json.dumps({"op": [tuning.entry(ROWS=10)]}))
    kernels = {80: {"op": [tuning.entry(ROWS=8)]}, 90: {"op": [tuning.entry(ROWS=9)]}}
    monkeypatch.setenv("EVAKERNELS_TUNING", str(tmp_path))
    monkeypatch.setattr(tuning, "shipped", lambda: kernels)
    tuning.clear_caches()
    yield tmp_path
    monkeypatch.undo()
    tuning.clear_caches()


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [(1440, torch.bfloat16, 4), (1456, torch.bfloat16, 2), (10**6, torch.float16, 2), (4096, torch.float32, 1)],
)
def test_nearest_shape_is_taken(folder, monkeypatch, width, dtype, rows):
    monkeypatch.setattr(tuning, "table", lambda name, capability: {"op": ENTRIES})
    assert tuning.config("op", {"width": width}, torch.empty(0, dtype=dtype))["ROWS"] == rows


@pytest.mark.parametrize(
    ("name", "capability", "rows"),
    [("NVIDIA A10G", 86, 10), ("NVIDIA L4", 89, 8), ("NVIDIA GeForce RTX 5090", 120, 9), ("Tesla V100", 70, 8)],
)
def test_gpu_without_file_takes_next_lower(folder, name, capability, rows):
    assert tuning.table(name, capability)["op"][0]["config"] == {"ROWS": rows}


def test_forced_configuration_is_of_block_and_thread():
    width, tensor = {"width": 512}, torch.empty(0)
    shipped = tuning.config("swiglu_forward", width, tensor)
    with tuning.forced("swiglu_forward", {"ROWS": 64}):
        assert tuning.config("swiglu_forward", width, tensor)["ROWS"] == 64
        assert tuning.config("swiglu_backward", width, tensor)["ROWS"] != 64
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tuning.config, "swiglu_forward", width, tensor).result() == shipped
    assert tuning.config("swiglu_forward", width, tensor) == shipped


@pytest.mark.parametrize("capability", tuning.shipped())
def test_every_op_has_entries_and_each_is_found(capability):
    content = tuning.table("", capability)
    assert content.keys() == {op for ops in FAMILIES.values() for op in ops}
    for op, entries in content.items():
        for entry in entries:
            shape = dict(entry["shape"])
            itemsize = shape.pop("itemsize", 2)
            found = tuning._nearest(op, tuple(sorted(shape.items())), itemsize, ("", capability))
            assert found == entry["config"], (op, entry)


def preference(monkeypatch, op, capability, name=""):
    monkeypatch.setattr(tuning, "find_gpu", lambda tensor: (name, capability))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        return backends.preference(op, (torch.empty(9, 64, dtype=torch.bfloat16, device="cuda"),))


@pytest.mark.parametrize(
    ("capability", "first"),
    [(80, "cuda"), (86, "cuda"), (89, "cuda"), (90, "triton"), (100, "triton"), (120, "cuda")],
)
def test_backend_order_on_gpus(monkeypatch, capability, first):
    for op in ("contrastive_forward", "contrastive_backward", "siglip_forward"):
        assert sorted(preference(monkeypatch, op, capability)) == sorted(backends.PREFERENCE)
        assert preference(monkeypatch, op, capability)[0] == first
    for op in ("rope_attention_forward", "layer_norm_backward"):
        assert preference(monkeypatch, op, capability) == backends.PREFERENCE


def test_measured_order_is_first(folder, monkeypatch):
    search.write("NVIDIA H100", {tuning.ORDER + "rope_attention_forward": ["triton", "cuda"]}, 90)
    search.write("NVIDIA H100", {tuning.ORDER + "siglip_forward": ["cuda", "triton"]}, 90)
    first = {
        op: preference(monkeypatch, op, 90, "NVIDIA H100")[0] for op in ("rope_attention_forward", "siglip_forward")
    }
    assert first == {"rope_attention_forward": "triton", "siglip_forward": "cuda"}


def test_order_is_by_mean_over_common_sizes():
    times = [{"cuda": 1.0, "triton": 2.0}, {"cuda": 5.0, "triton": 2.0}, {"triton": 1.0}]
    assert search.order(times) == ["triton", "cuda"]
    assert search.order(times[2:]) == ["triton"]


# --- the command and the search -------------------------------------------------------------------------------------


def test_command_without_gpu_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--op", "swiglu_forward"]) == 2
    assert "GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "--op", "SwiGLU_forward"])
    assert "did you mean 'swiglu_forward'" in capsys.readouterr().err


def test_search_finds_the_best_usable():
    asked = []

    def time_of(config):
        asked.append(config)
        rows, warps = config["ROWS"], config["num_warps"]
        if rows / warps > 0.5:
            return None
        return abs(rows - 8) + abs(warps - 16) + config["num_stages"]

    best = search.search({"ROWS": 1, "num_warps": 2, "num_stages": 2}, time_of)
    assert best == {"ROWS": 8, "num_warps": 16, "num_stages": 1}
    assert len(asked) == len({tuple(config.values()) for config in asked})


def test_search_ignores_gains_within_noise():
    start = {"ROWS": 2, "num_warps": 4}
    assert search.search(start, lambda config: 1.0 if config == start else 0.995) == start
    with pytest.raises(ValueError, match="configuration"):
        search.search(start, lambda config: None)


def test_measured_file_is_found_by_gpu_name(folder):
    entries = [{"shape": {"width": 512}, "config": {"ROWS": 32}}]
    path = search.write("NVIDIA H100 80GB HBM3", {"other": entries}, 90)
    assert path == folder / "nvidia_h100_80gb_hbm3.json"
    assert tuning.table("NVIDIA H100 80GB HBM3", 90) == tuning.shipped()[90] | {"other": entries}
    assert len(list(folder.iterdir())) == 2


def test_measured_files_are_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("EVAKERNELS_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuning.folder() == Path("/cache/evakernels/tuning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.folder() == Path.home() / ".cache/evakernels/tuning"
