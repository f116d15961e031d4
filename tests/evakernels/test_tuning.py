"""Launch configurations: the look-up, what is shipped, and the search for better ones."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import evakernels
from evakernels import backends, tuning
from evakernels.triton import FAMILIES
from evakernels.tuning.__main__ import main
from evakernels.tuning.predicted import row

pytest.importorskip("triton")
search = pytest.importorskip("evakernels.tuning.search")

OP = "rope_attention_forward"
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
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "shipped", lambda: kernels)
    clear()
    yield tmp_path
    clear()


def clear(table=tuning.table) -> None:
    table.cache_clear()
    tuning._nearest.cache_clear()
    tuning._times.cache_clear()


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


def test_forced_configuration_ends_with_its_block():
    width, tensor = {"width": 512}, torch.empty(0)
    shipped = tuning.config("swiglu_forward", width, tensor)
    with tuning.forced("swiglu_forward", {"ROWS": 64}):
        assert tuning.config("swiglu_forward", width, tensor)["ROWS"] == 64
        assert tuning.config("swiglu_backward", width, tensor)["ROWS"] != 64
    assert tuning.config("swiglu_forward", width, tensor) == shipped


@pytest.mark.parametrize("capability", tuning.shipped())
def test_every_op_has_entries_and_each_is_found(capability):
    content = tuning.table("", capability)
    # siglip_backward only multiplies what forward has found; lamb_step is the other two ops of its family.
    assert {*content, "siglip_backward", "lamb_step"} == {op for ops in FAMILIES.values() for op in ops}
    for op, entries in content.items():
        for entry in entries:
            shape = dict(entry["shape"])
            itemsize = shape.pop("itemsize", 2)
            found = tuning._nearest(op, tuple(sorted(shape.items())), itemsize, ("", capability))
            assert found == entry["config"], (op, entry)


def explained(tokens):
    with FakeTensorMode():
        q = torch.empty(256, tokens, 16, 64, dtype=torch.bfloat16, device="cuda")
    return evakernels.explain("rope_attention_forward", q, q, q, None, None, None, 0, False, True, 1.0).splitlines()


def test_times_decide_the_backend_and_are_explained(folder, monkeypatch):
    known = {"rope_attention_forward": [row(64, 257, 4096, cuda=2, triton=1), row(64, 1025, 4096, cuda=1, triton=2)]}
    monkeypatch.setattr(tuning, "MICROSECONDS", {80: known})
    monkeypatch.setattr(tuning, "gpu_of", lambda tensor: ("NVIDIA H100", 90))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clear()
    first, second, *_, why = explained(197)
    assert (first.split(":")[0], second.split(":")[0]) == tuple(f"{OP} on {backend}" for backend in ("triton", "cuda"))
    assert why == f"order of {OP}: triton 1 us, cuda 2 us, predicted for head_dim 64, tokens 257, heads 4096"
    assert explained(700)[0].startswith(f"{OP} on cuda")
    search.write("NVIDIA H100", {OP + tuning.TIMES: [row(64, 577, 4096, cuda=3, triton=2.5, torch=2)]}, 90, folder)
    tuning.clear_caches()
    first, *_, why = explained(700)
    assert first.startswith(f"{OP} on torch: ")
    assert why.endswith("torch 2 us, triton 2.5 us, cuda 3 us, measured for head_dim 64, tokens 577, heads 4096")


@pytest.mark.parametrize(("longest", "tokens"), [(60, 77), (900, 1025)])
def test_packed_attention_has_predicted_times(monkeypatch, longest, tokens):
    monkeypatch.setattr(tuning, "gpu_of", lambda tensor: ("", 90))
    q = torch.empty(longest * 8, 16, 64, dtype=torch.bfloat16, device="meta")
    for op in ("packed_attention_forward", "packed_attention_backward"):
        times = tuning.times(op, {"max_seqlen": longest}, q)
        assert times is not None
        assert (times.shape["tokens"], times.is_measured) == (tokens, False)


@pytest.mark.parametrize("op", ["contrastive_forward", "contrastive_backward", "siglip_forward"])
def test_measured_loss_times_follow_depth(folder, monkeypatch, op):
    """`tuning run` writes times of the losses by width and itemsize of the features."""
    monkeypatch.setattr(tuning, "gpu_of", lambda tensor: ("NVIDIA H100", 90))
    sizes = (512, 2), (1024, 2), (768, 4)
    rows = [{"shape": {"depth": depth, "itemsize": size}, "config": {"triton": depth}} for depth, size in sizes]
    search.write("NVIDIA H100", {op + tuning.TIMES: rows}, 90, folder)
    tuning.clear_caches()
    image, of_rows = torch.empty(9, 768, dtype=torch.bfloat16), torch.empty(9)
    first = of_rows if "backward" in op else image
    assert tuning.times(op, {"image": image}, first).shape["depth"] == 1024
    assert tuning.times(op, {}, image).is_measured


@pytest.mark.parametrize(
    ("capability", "first"),
    [(80, "cuda"), (86, "cuda"), (89, "cuda"), (90, "triton"), (100, "triton"), (120, "cuda")],
)
def test_predicted_times_order_loss_backends(monkeypatch, capability, first):
    monkeypatch.setattr(tuning, "gpu_of", lambda tensor: ("", capability))
    image = torch.empty(9, 768, dtype=torch.bfloat16)
    for op in ("contrastive_forward", "contrastive_backward", "siglip_forward", "siglip_value"):
        times = tuning.times(op, {"image": image}, image)
        assert backends.preference(times)[0] == first


def test_predicted_times_are_of_known_ops_and_backends():
    for known in tuning.MICROSECONDS.values():
        assert known.keys() <= backends.ops().keys()
        assert all(set(entry["config"]) == {"cuda", "triton"} for entries in known.values() for entry in entries)


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
    path = search.write("NVIDIA H100 80GB HBM3", {"other": entries}, 90, folder)
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    clear()
    assert tuning.table("NVIDIA H100 80GB HBM3", 90) == tuning.shipped()[90] | {"other": entries}
    assert len(list(folder.iterdir())) == 2
