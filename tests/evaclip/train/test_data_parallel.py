"""Two ranks give what one gives; process groups, timeouts, and how torchrun ends a failed run."""

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from image_files import as_file
from PIL import Image
from processes import in_processes
from small_tasks import TASKS
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from trained_runs import assert_equal, evaluations, records, steps, weights

from evaclip.commands.main import main
from evaclip.data import Batch
from evaclip.data.shard_writer import write_shard
from evaclip.data.workers import WorkerDied
from evaclip.errors import RanksLost, ReplicasDiffer, UserError
from evaclip.train import distributed, run_folder, trainer
from evaclip.train.config import ParallelConfig, TrainConfig
from evaclip.train.distributed import GradientMean, World, check_replicas, connect, naming_lost_ranks
from evaclip.train.overrides import dump_yaml
from evaclip.train.sharding import _mesh
from evaclip.train.step import TrainStep
from evaclip.train.trainer import train


def run_two(config: TrainConfig, folder: Path) -> str:
    """Trains in two processes that torchrun starts, as users do; returns what they printed."""
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "evaclip", "train", "tiny", "--config", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "autograd" not in result.stderr
    return result.stdout


def uneven_shards(folder: Path) -> str:
    """Shards of 1, 37, 0 and 2 samples, one of which can't be read: neither processes nor workers get equal parts."""
    folder.mkdir()
    for shard, (first, last) in enumerate([(0, 1), (1, 38), (38, 38), (38, 40)]):
        write_shard(folder / f"{shard:05d}.tar", map(_sample, range(first, last)))
    return str(folder)


def _sample(number: int) -> tuple[str, dict[str, bytes]]:
    picture = as_file(Image.new("RGB", (16, 16), (5 * number, 200 - 5 * number, 40)))[: 40 if number == 20 else None]
    return f"{number:06d}", {"png": picture, "txt": b"number %d" % number}


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Started by torchrun, on shards that can't be cut into equal parts. Other tasks: `test_sharding.py`."""
    task = "siglip"
    common = [
        *TASKS[task].patch_dropout, "accumulation_steps=2", "schedule.steps=4",
        "optim={name: lamb, grad_clip_norm: 0.5}",
        "eval.sets.val={data: {num_samples: 64, workers: 0}, samples: 16}",
        f"data.train={uneven_shards(tmp_path / 'shards')}",
    ]  # fmt: skip
    one, two = train(run_config(*common, "name=one", task=task)).folder, tmp_path / "two"
    assert run_two(run_config(*common, "name=two", task=task), tmp_path).count("step 1/4") == 1
    expected, found = weights(one, 4), weights(two, 4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for left, right in zip(records(one), records(two), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5, abs=1e-6)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
        assert right["samples"] == left["samples"]
        assert right["bad_samples"] == left["bad_samples"]
        assert right.get("accuracy") == pytest.approx(left.get("accuracy"))
        for key in (key for key in left if key.startswith("update_")):
            assert right[key] == pytest.approx(left[key], rel=1e-3), key
        tokens = [record["tokens_per_second"] / record["samples_per_second"] for record in (left, right)]
        assert tokens[1] == pytest.approx(tokens[0])
    metrics = [evaluations(run)[4] for run in (one, two)]
    assert TASKS[task].metrics < metrics[0].keys()
    assert metrics[1] == pytest.approx(metrics[0] | {"seconds": metrics[1]["seconds"]}, rel=1e-5, abs=1e-6)


def stop_and_resume(straight: TrainConfig, config: TrainConfig) -> None:
    """The second rank gets SIGTERM in its third step; votes are the all-reduces of a few integers."""
    reduce, step = dist.all_reduce, TrainStep.__call__
    course = list[str]()

    def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        work = reduce(tensor, *args, **options)
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            return work
        number = len([event for event in course if "vote" in event]) + 1
        course.append(f"vote {number}")
        if work is None:
            course.append(f"wait {number}")
        return Mock(wait=lambda: (course.append(f"wait {number}"), work.wait()))

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> Any:
        course.append(f"step {number + 1}")
        if number == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number, **options)

    with ExitStack() as stack:
        world = stack.enter_context(closing(connect("cpu")))
        stack.enter_context(patch.object(World, "close"))  # the next run needs it still
        stack.enter_context(patch.object(trainer, "connect", lambda *_: world))
        stack.enter_context(patch.object(trainer, "_VOTE_SECONDS", 0))
        train(straight)
        with patch.object(dist, "all_reduce", all_reduce), patch.object(TrainStep, "__call__", call):
            outcome = train(config)
        resumed = train(config, resume="auto")
    assert " ".join(course[:12]) == (
        "step 1 vote 1 wait 1 step 2 vote 2 wait 1 step 3 vote 3 wait 2 step 4 vote 4 wait 3"
    )
    assert (outcome.steps, outcome.stopped_by, resumed.steps) == (4, 143, 6)


@pytest.mark.xdist_group("processes")
def test_ranks_vote_during_the_next_step(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    in_processes(2, stop_and_resume, run_config("name=straight"), run_config())
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def stop_between_votes(config: TrainConfig, folder: Path) -> None:
    """Steps take 0.25 s on rank 0 and 0.15 s on rank 1, which gets SIGTERM in its third step."""
    rank, clock, course = int(os.environ["RANK"]), [0.0], list[int]()
    begin, step = World.begin_count, TrainStep.__call__

    def call(self: TrainStep, batch: Any, number: int, **options: bool) -> Any:
        clock[0] += (0.25, 0.15)[rank]
        if (rank, number) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        course.append(number + 1)
        return step(self, batch, number, **options)

    def begin_count(self: World, *numbers: int) -> Any:
        if len(numbers) == 3:
            course.append(-course[-1])
        return begin(self, *numbers)

    clocks = patch.object(trainer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    steps_and_votes = patch.object(TrainStep, "__call__", call), patch.object(World, "begin_count", begin_count)
    with clocks, steps_and_votes[0], steps_and_votes[1]:
        outcome = train(config)
    votes = [-number for number in course if number < 0]
    (folder / f"{rank}.json").write_text(json.dumps([outcome.steps, outcome.stopped_by, votes]))


@pytest.mark.xdist_group("processes")
def test_ranks_vote_once_a_second(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Every five steps of 0.2 s; a vote is read at the next one."""
    in_processes(2, stop_between_votes, run_config("schedule.steps=20"), tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [11, 143, [1, 6, 11]]


def save_when_time_is_up(config: TrainConfig) -> None:
    """The clock of the second rank goes forward by an hour in its third step."""
    ahead, step = [0.0], TrainStep.__call__

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> Any:
        ahead[0] += 3600 if number == 2 and os.environ["RANK"] == "1" else 0
        return step(self, batch, number, **options)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    votes = patch.object(trainer, "_VOTE_SECONDS", 0)
    with patch.object(TrainStep, "__call__", call), patch.object(trainer, "time", clock), votes:
        train(config)


@pytest.mark.xdist_group("processes")
def test_checkpoint_by_time_is_written_once(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    in_processes(2, save_when_time_is_up, run_config("checkpoint={every_minutes: 30, keep: 9}"))
    assert steps(tmp_path / "run") == [4, 6]


def train_elsewhere(config: TrainConfig, folder: Path, shared: bool) -> None:
    """The second process is in another folder, or finds the first one's there after a moment."""
    mine = folder / os.environ["RANK"]
    mine.mkdir()
    os.chdir(mine)
    if os.environ["RANK"] == "1" and shared:
        threading.Timer(2, lambda: (mine / "runs").symlink_to(folder / "0" / "runs")).start()
    elsewhere = pytest.raises(UserError, match=rf"/0/runs/run.*1 of 2 ranks, on {socket.gethostname()}; ")
    with patch.object(run_folder, "ATTRIBUTES", 300 if shared else 1), nullcontext() if shared else elsewhere:
        train(config)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_is_not_shared_is_seen_at_start(shared, run_config, tmp_path):
    in_processes(2, train_elsewhere, run_config("output=runs", "schedule.steps=1"), tmp_path, shared)


def check_timeouts(config: TrainConfig) -> None:
    with connect("cpu", config.parallel) as world:
        saving, mesh = world.new_saving_group(), _mesh(config.parallel, world)
        groups = [world.group, world.control, saving, *mesh.get_all_groups()]
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert [limit / timedelta(minutes=1) for limit in limits] == [240, 240, 720, 240, 240]


@pytest.mark.xdist_group("processes")
def test_timeouts_of_steps_and_saving(run_config: Callable[..., TrainConfig]) -> None:
    limits = "timeout_minutes: 240, saving_timeout_minutes: 720"
    in_processes(2, check_timeouts, run_config(f"parallel={{mode: hybrid, shard_size: 2, {limits}}}"))


def test_nccl_timeout_writes_last_collectives(run_config, monkeypatch, tmp_path):
    """With stand-ins for NCCL's recorder and groups; the user's variable stays, and torch's end with the run."""
    folder, inside = tmp_path / "run/flight-recorder", {}

    def fail(_: Any) -> None:
        inside.update(os.environ)
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")

    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"collectives", raising=False)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", Mock())
    monkeypatch.setattr(trainer, "connect", lambda *_: World(torch.device("cuda"), 3, 1024, Mock(), Mock()))
    monkeypatch.setattr(trainer, "require_trackers", fail)
    monkeypatch.setenv("WORLD_SIZE", "1024")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "9")
    before = dict(os.environ)
    with pytest.raises(RanksLost, match=f"parallel.timeout_minutes=120.*torchfrtrace {folder}"):
        train(run_config())
    assert (inside["TORCH_FR_DUMP_TEMP_FILE"], inside["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == (f"{folder}/rank_", "1")
    assert "TORCH_FR_BUFFER_SIZE" not in inside
    assert dict(os.environ) == before
    assert (folder / "rank_3").read_bytes() == b"collectives"


def damage_rank_1(folder: Path) -> None:
    """Flips the lowest bit of one weight of rank 1 after step 4; writes exit status and stderr of each rank."""
    step, rank = TrainStep.__call__, os.environ["RANK"]

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> Any:
        result = step(self, batch, number, **options)
        if number == 3 and rank == "1":
            self.parameters[0].data.view(torch.int32).view(-1)[0] ^= 1
        return result

    with patch.object(TrainStep, "__call__", call), redirect_stderr(io.StringIO()) as errors:
        status = main(["train", "tiny", "--config", str(folder / "config.yaml")])
    (folder / f"{rank}.json").write_text(json.dumps([status, errors.getvalue()]))


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("due", ["log", "checkpoint"])
def test_replica_with_other_weights_is_named(due: str, run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Before a record is logged, and before a checkpoint is written."""
    every = {"log": 4, "checkpoint": 9} if due == "log" else {"log": 9, "checkpoint": 2}
    config = run_config(f"log.every_steps={every['log']}", f"checkpoint.every_steps={every['checkpoint']}")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    in_processes(2, damage_rank_1, tmp_path)
    for rank in range(2):
        status, message = json.loads((tmp_path / f"{rank}.json").read_text())
        assert status == os.EX_TEMPFAIL
        assert f"on rank 1 ({socket.gethostname()});" in message
        assert "another start would fail" not in message
    assert steps(tmp_path / "run") == ([] if due == "log" else [2])


def compare_shards(config: ParallelConfig) -> None:
    """Rank 3 has another element in its shard, then also rank 2 in a whole parameter."""
    with connect("cpu") as world:
        mesh, is_sharded_once = _mesh(config, world), config.mode == "shard"
        placements = [Shard(0)] if is_sharded_once else [Replicate(), Shard(0)]
        shards, whole = distribute_tensor(torch.arange(16.0).view(4, 4), mesh, placements), torch.ones(2)
        check_replicas([shards, whole], world)
        if world.rank == 3:
            shards.to_local()[0, 0] = 7.5
        differs = pytest.raises(ReplicasDiffer, match=r"on rank 3 \(")
        with nullcontext() if is_sharded_once else differs:
            check_replicas([shards, whole], world)
        whole[0] += world.rank == 2
        names = r"on rank 2 \(" if is_sharded_once else r"on rank 2 \(.*, rank 3 \("
        with pytest.raises(ReplicasDiffer, match=names):
            check_replicas([shards, whole], world)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("mode", ["hybrid", "shard"])
def test_check_replicas_compares_equal_shards(mode: str) -> None:
    in_processes(4, compare_shards, ParallelConfig(mode=mode, shard_size=2 if mode == "hybrid" else None))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 75),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), 75),
        (dist.DistBackendError("NCCL communicator was aborted on rank 3"), 75),
        (dist.DistNetworkError("The client socket has timed out"), 75),
        (WorkerDied("data worker 1 was killed by SIGKILL"), 75),
        (RuntimeError("Connection closed by peer"), 75),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1),
        (UserError("lr must be positive"), 2),
    ],
)
def test_status_tells_whether_another_start_helps(error, status, run_config, tmp_path, monkeypatch, capsys):
    def fail(*args: Any, **options: bool) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "__call__", fail)
    (tmp_path / "config.yaml").write_text(dump_yaml(run_config()))
    assert main(["train", "tiny", "--config", str(tmp_path / "config.yaml")]) == status
    assert capsys.readouterr().err.startswith("error: ")


def test_failed_connection_may_be_tried_again(run_config, tmp_path, monkeypatch):
    def fail(*args: Any) -> None:
        raise dist.DistNetworkError("The client socket has timed out after 60000ms")

    monkeypatch.setattr(trainer, "connect", fail)
    (tmp_path / "config.yaml").write_text(dump_yaml(run_config()))
    assert main(["train", "tiny", "--config", str(tmp_path / "config.yaml")]) == os.EX_TEMPFAIL


def test_end_of_another_rank_is_named() -> None:
    world = World(torch.device("cpu"), 0, 2)
    with (
        pytest.raises(RanksLost, match=r"another rank has ended.*signal 9"),
        naming_lost_ranks(ParallelConfig(), world),
    ):
        raise RuntimeError("[../pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(("error", "left"), [(None, "destroy"), (ValueError("one rank"), "abort")])
def test_error_aborts_nccl_groups(error, left, monkeypatch):
    """With a stand-in for NCCL's groups, whose `destroy_process_group` waits for kernels of other ranks."""
    calls, group = [], Mock()
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    with suppress(ValueError), World(torch.device("cuda"), 0, 2, group, group):
        if error is not None:
            raise error
    assert calls == [left]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_mean_of_1024_ranks_is_exact(dtype, monkeypatch):
    """A stand-in adds equal gradients of all ranks; 16-bit sums stop growing, or overflow, before the last one."""

    def all_reduce(tensor: torch.Tensor, **_: Any) -> Any:
        own = tensor.clone()
        for _ in range(1023):
            tensor += own
        return Mock()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    mean = GradientMean([parameter], [], World(torch.device("cpu"), size=1024))
    mean.begin()
    (parameter * torch.tensor([1.0, -100.0, 0.01], dtype=dtype)).sum().backward()
    expected = parameter.grad.clone()
    mean.finish()
    assert torch.equal(parameter.grad, expected)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connect_raises_the_limit_of_open_files(few_open_files, monkeypatch):
    """A stand-in opens as many descriptors for the first group as 1,024 ranks take."""
    original = dist.init_process_group

    def init_process_group(*args: Any, **options: Any) -> None:
        with ExitStack() as stack:
            for _ in range(1024):
                stack.enter_context(Path(os.devnull).open())
        original(*args, **options)

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    connect("cpu", ParallelConfig(mode="shard", offload="cpu")).close()


def write_course(folder: Path) -> None:
    """Rank 0 writes when each gradient reduction of a step begins, with one micro-batch and with three."""
    with closing(connect("cpu")) as world:
        for chunks in (1, 3):
            write_course_of(world, folder, chunks)


def write_course_of(world: World, folder: Path, chunks: int) -> None:
    torch.manual_seed(world.rank)
    layers = [torch.nn.Linear(64, 64) for _ in range(6)]
    model, rest = torch.nn.Sequential(*layers), torch.nn.Parameter(torch.ones(()))
    x, course = torch.randn(8, 64), []
    # Each layer is a bucket.
    with patch.object(distributed, "BUCKET_BYTES", 4 * 65 * 64), patch.object(distributed, "_IN_FLIGHT", 2):
        mean = GradientMean(list(model.parameters()), [rest], world)
    layers[0].weight.register_post_accumulate_grad_hook(lambda _: course.append("last gradient"))
    reduce = dist.all_reduce

    def recorded(tensor: torch.Tensor, **options: Any) -> Any:
        course.append(tensor.numel())
        return reduce(tensor, **options)

    with patch.object(dist, "all_reduce", recorded):
        for part in range(chunks):
            if part == chunks - 1:
                mean.begin()
            (rest * model(x + part)).square().mean().backward()
        during = list(course)
        mean.finish()
    if world.is_main:
        (folder / f"{chunks}.json").write_text(json.dumps({"during": during, "all": course}))


def test_gradients_are_reduced_while_others_are_made(tmp_path: Path) -> None:
    in_processes(2, write_course, tmp_path)
    for chunks in (1, 3):
        course = json.loads((tmp_path / f"{chunks}.json").read_text())
        # Five of six layers are on their way before the first layer's gradient is there, in the last micro-batch only.
        passes = course["during"]
        assert passes.count("last gradient") == chunks
        assert passes[: chunks - 1] == ["last gradient"] * (chunks - 1)
        assert passes[chunks - 1 :].index("last gradient") >= 4
        reductions = [event for event in course["all"] if event != "last gradient"]
        assert reductions == [65 * 64] * 6 + [1]


pytestmark = pytest.mark.exhaustive


FAILING = """
import os, sys, torch
from evaclip.commands.main import main
from evaclip.train.step import TrainStep
from evaclip.train.trainer import TrainingDiverged

def fail(self, *args, **options):
    if {kind!r} == "diverged":
        raise TrainingDiverged("the loss was not finite")
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(self, *args, **options)

with open({starts!r}, "a") as file:
    file.write(os.environ["RANK"])
step, TrainStep.__call__ = TrainStep.__call__, fail
sys.exit(main(["train", "tiny", "--config", {config!r}, "--resume", "auto"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diverged", "memory"])
def test_final_error_starts_once(kind: str, run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """In one rank or in all; torchrun ends with an error that no batch script takes for a stop by a signal."""
    starts, program, path = tmp_path / "starts", tmp_path / "program.py", tmp_path / "config.yaml"
    path.write_text(dump_yaml(run_config()))
    program.write_text(FAILING.format(kind=kind, starts=str(starts), config=str(path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert sorted(starts.read_text()) == ["0", "1"]
