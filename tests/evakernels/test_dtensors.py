"""Row-wise ops and apex's optimizers on DTensors of two processes, beside the same on whole tensors."""

import importlib
import pkgutil
from functools import partial

import pytest
import torch
from op_checks import message_of, randn
from rank_tests import results_of_ranks
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import evakernels
from evakernels import ops
from evakernels.compat.apex import FusedAdam, FusedLAMB

pytestmark = pytest.mark.xdist_group("processes")

WORLD = 2
ROWS, WIDTH = (3, 5, 4), (4,)  # neither number of rows is even


def joined(op, *given):
    residual, branch, weight, *bias, layer_scale, row_scale = given
    return op(residual, branch, weight, *bias, layer_scale=layer_scale, row_scale=row_scale)


CASES = {
    "layer_norm": (evakernels.layer_norm, [ROWS, WIDTH, WIDTH]),
    "rms_norm": (evakernels.rms_norm, [ROWS, WIDTH]),
    "add_layer_norm": (partial(joined, evakernels.add_layer_norm), [ROWS, ROWS, WIDTH, WIDTH, WIDTH, ROWS[:1]]),
    "add_rms_norm": (partial(joined, evakernels.add_rms_norm), [ROWS, ROWS, WIDTH, WIDTH, ROWS[:1]]),
    "layer_norm_add": (partial(joined, evakernels.layer_norm_add), [ROWS, ROWS, WIDTH, WIDTH, WIDTH, ROWS[:1]]),
    "rms_norm_add": (partial(joined, evakernels.rms_norm_add), [ROWS, ROWS, WIDTH, WIDTH, ROWS[:1]]),
    "swiglu": (evakernels.swiglu, [ROWS, ROWS]),
    "swiglu-norm": (evakernels.swiglu, [ROWS, ROWS, WIDTH, WIDTH]),
    "gelu": (evakernels.gelu, [ROWS, WIDTH]),
}
ELEMENTWISE = ("swiglu", "gelu")
OPTIMIZERS = {"adam": partial(FusedAdam, master_weights=True), "lamb": FusedLAMB}


def test_every_sharded_op_has_a_case():
    modules = [importlib.import_module(f"evakernels.ops.{each.name}") for each in pkgutil.iter_modules(ops.__path__)]
    sharded = {
        module.__name__.rpartition(".")[2]
        for module in modules
        if any(getattr(op, "sharding", None) for op in vars(module).values())
    }
    named = {case.partition("-")[0].replace("rms", "layer").replace("add_", "").replace("_add", "") for case in CASES}
    assert sharded == named


def whole_inputs(shapes):
    return [randn(*shape, seed=i).requires_grad_(len(shape) != 1 or shape == WIDTH) for i, shape in enumerate(shapes)]


def results(function, given):
    outputs = function(*given)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    cotangents = [randn(*out.shape, seed=20 + i) for i, out in enumerate(outputs)]
    if isinstance(outputs[0], DTensor):
        mesh = outputs[0].device_mesh
        cotangents = [distribute_tensor(x, mesh, [Replicate()]) for x in cotangents]
    leaves = [x for x in given if x.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, leaves, cotangents))


def described(tensors):
    def place(placement):
        return "P" if placement.is_partial() else str(placement)

    return [(place(*x.placements), x.full_tensor().detach()) for x in tensors]


def on_shards(mesh, name, dim):
    function, shapes = CASES[name]
    places = [Shard(dim) if shape == ROWS else Replicate() for shape in shapes]
    given = [
        distribute_tensor(x.detach(), mesh, [place]).requires_grad_(x.requires_grad)
        for x, place in zip(whole_inputs(shapes), places, strict=True)
    ]
    outputs, gradients = results(function, given)
    return described(outputs), described(gradients)


def of_a_block(mesh):
    """Float32 kernels: a norm made sequence parallel by torch, and a residual add with a partial branch."""
    norm = parallelize_module(evakernels.nn.LayerNorm(4), mesh, SequenceParallel())
    x = distribute_tensor(randn(*ROWS).float(), mesh, [Shard(1)])
    branch = DTensor.from_local(norm(x).full_tensor() / WORLD, mesh, [Partial()])
    return described(evakernels.add_layer_norm(x, branch, norm.weight, norm.bias))


def compiled(mesh):
    function = torch.compile(evakernels.rms_norm, backend="aot_eager", fullgraph=True)
    given = [distribute_tensor(randn(4, 2, 4), mesh, [Shard(0)]).requires_grad_()]
    given.append(distribute_tensor(randn(4), mesh, [Replicate()]).requires_grad_())
    outputs, gradients = results(function, given)
    return described(outputs), described(gradients)


def stepped(make, mesh=None):
    """A parameter after three steps, and the keys of its state."""
    weight, *grads = (randn(5, 4, seed=i).float() for i in range(4))
    param = weight.bfloat16() if make is OPTIMIZERS["adam"] else weight

    def placed(tensor):
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    param = torch.nn.Parameter(placed(param))
    optimizer = make([param], lr=1e-3)
    for grad in grads:
        param.grad = placed(grad.to(param.dtype))
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return (param if mesh is None else param.full_tensor()).detach(), {i: sorted(state[i]) for i in state}


def work(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {(name, dim): on_shards(mesh, name, dim) for name in CASES for dim in range(3)}
    found["block"] = of_a_block(mesh)
    found["compiled"] = compiled(mesh)
    found["stepped"] = {name: stepped(make, mesh) for name, make in OPTIMIZERS.items()}
    x = distribute_tensor(randn(*ROWS), mesh, [Shard(0)])
    found["plain"] = message_of(evakernels.layer_norm, x, torch.ones(4).double())
    other = distribute_tensor(randn(*WIDTH), init_device_mesh("cpu", (1, WORLD)), [Replicate()] * 2)
    found["meshes"] = message_of(evakernels.rms_norm, x, other)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_ranks(work, WORLD, folder, "evakernels.nn", "torch.distributed.tensor.parallel")


def values(found):
    return [value for _, value in found]


def places(found):
    return [place for place, _ in found]


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("name", CASES)
def test_shards_match_whole_tensors(ranks, name, dim):
    function, shapes = CASES[name]
    outputs, gradients = results(function, whole_inputs(shapes))
    stays = dim < 2 or name in ELEMENTWISE
    rows = f"S({dim})" if stays else "R"
    leaves = [shape for shape in shapes if shape != ROWS[:1]]
    of_parameters = "P" if dim < 2 else "R"
    for found_outputs, found_gradients in (rank[name, dim] for rank in ranks):
        torch.testing.assert_close(values(found_outputs), outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(values(found_gradients), gradients, rtol=1e-12, atol=1e-12)
        assert set(places(found_outputs)) == {rows}
        assert [p for p, shape in zip(places(found_gradients), leaves, strict=True) if shape == WIDTH] == [
            of_parameters
        ] * leaves.count(WIDTH)


def test_torchs_sequence_parallelism(ranks):
    norm = evakernels.nn.LayerNorm(4)
    x = randn(*ROWS).float()
    expected = list(evakernels.add_layer_norm(x, norm(x), norm.weight, norm.bias))
    for rank in ranks:
        torch.testing.assert_close(values(rank["block"]), [e.detach() for e in expected])
        assert places(rank["block"]) == ["S(1)"] * 2


def test_compiled(ranks):
    given = [randn(4, 2, 4).requires_grad_(), randn(4).requires_grad_()]
    outputs, gradients = results(evakernels.rms_norm, given)
    for rank in ranks:
        found_outputs, found_gradients = rank["compiled"]
        torch.testing.assert_close(values(found_outputs), [out.detach() for out in outputs])
        torch.testing.assert_close(values(found_gradients), gradients)
        assert places(found_outputs) == ["S(0)"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_apexs_optimizers(ranks, name):
    expected, keys = stepped(OPTIMIZERS[name])
    for rank in ranks:
        found, found_keys = rank["stepped"][name]
        torch.testing.assert_close(found, expected)
        assert found_keys == keys


def test_what_does_not_fit_together_is_named(ranks):
    for rank in ranks:
        assert "TypeError: layer_norm: tensors must be all DTensors" in rank["plain"]
        assert "ValueError: layer_norm: DTensors must be of one mesh" in rank["meshes"]
