"""python -m ptx_interpreter FILE.py [ARGS...]: runs the Triton kernels of a Python file on the CPU and checks them.

The file sees a GPU: torch's `cuda` devices are the CPU, and each launch of a Triton kernel runs the PTX that Triton
compiles for the GPU in the interpreter. README.md shows reports.
"""

import argparse
import linecache
import math
import os
import runpy
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources

from ptx_interpreter import Fault, GlobalMemory, Report, Traffic, Unsupported
from ptx_interpreter.instructions.memory import UNEQUAL
from ptx_interpreter.memory import Interval, Shadow
from ptx_interpreter.triton_driver import SHARED_KB, WARP, Driver

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ANSWERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_cpu.__get__: False,
    torch.Tensor.get_device: 0,
    torch.Tensor.is_pinned: False,
}
"""Properties and methods of tensors that name the device, and what a tensor of the GPU returns."""
COPIES_TO_DEVICE = (torch.Tensor.cuda, torch.Tensor.pin_memory)
TRITON = str(Path(triton.__file__).parent)
PRUNE = Autotuner.prune_configs
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
"""torch's operators that return memory which nobody has written."""


class CudaDevices(TorchFunctionMode):
    """Tensors say that they are on a GPU, and are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            return ANSWERS[func]
        if func in COPIES_TO_DEVICE:
            return args[0]
        given = dict(kwargs or {})
        if func is torch.Tensor.backward:  # whose functions of the user's need the mode
            names = ("grad_tensors", "retain_graph", "create_graph", "inputs")
            given["grad_tensors"] = given.pop("gradient", None)
            with self:
                return torch.autograd.backward(args[0], **given | dict(zip(names, args[1:], strict=False)))
        args = [CPU if isinstance(arg, torch.device) and arg.type == "cuda" else arg for arg in args]
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args[1] = CPU
        if given.get("device") is not None and str(given["device"]) != "meta":
            given["device"] = CPU
        given.pop("pin_memory", None)
        return func(*args, **given)


class Tensors(TorchDispatchMode):
    """The memory of all tensors, and which of it has been written."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, Interval]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_empty = func.overloadpacket.__name__ in EMPTY
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.interval_of(value, written=not is_empty)
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
                for each in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(each, torch.Tensor):
                        self._mark_written(each)
        return result

    def interval_of(self, tensor: torch.Tensor, *, written: bool = True) -> Interval | None:
        """The memory of a tensor's storage; `written` matters for a storage that wasn't known."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        known = self._known.get(start)
        if known and known[0].cdata == storage._cdata and not known[0].expired() and known[1].end == start + size:
            return known[1]
        if not size:
            return None
        interval = Interval(start, start + size)
        if not written:
            interval.shadow = Shadow.of(size, min(tensor.itemsize, 8), written=False)
        self._known[start] = StorageWeakRef(storage), interval
        return interval

    def _mark_written(self, tensor: torch.Tensor) -> None:
        interval = self.interval_of(tensor)
        if interval is None or (shadow := interval.shadow) is None or not tensor.numel():
            return
        writer = torch.from_numpy(shadow.writer)
        if tensor.itemsize == shadow.cell:
            writer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(-1)
        else:
            first = (tensor.data_ptr() - interval.start) // shadow.cell
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            writer[first : first + -(-last * tensor.itemsize // shadow.cell)] = -1

    def prepare(self, memory: GlobalMemory, arguments: dict[str, Any]) -> None:
        """Lets a kernel touch all tensors that live; races are looked for in its arguments."""
        self._known = {start: each for start, each in self._known.items() if not each[0].expired()}
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and (interval := self.interval_of(tensor)):
                interval.name = name
                size = interval.end - interval.start
                interval.shadow = interval.shadow or Shadow.of(size, min(tensor.itemsize, 8), written=True)
        memory.hold([interval for _, interval in self._known.values()])


@dataclass(frozen=True)
class Place:
    """A line of a source file."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.path) if Path(self.path).is_relative_to(os.getcwd()) else self.path}:{self.line}"

    @property
    def text(self) -> str:
        return linecache.getline(self.path, self.line).strip()


@dataclass
class Finding:
    """A fault, by the line of the Triton source; `callers`: the lines from which that one was inlined."""

    kernel: str
    kind: str
    place: Place
    callers: tuple[Place, ...]
    fault: Fault
    program: tuple[int, int, int]
    accesses: int = 0

    def __str__(self) -> str:
        calls = "".join(f"\n    called from {caller}: {caller.text}" for caller in self.callers)
        who = f"thread {self.fault.thread} of program {self.program}, `{self.fault.instruction}`"
        return (
            f"{self.place}: {self.kind} in {self.kernel}: {self.fault.detail}\n    {self.place.text}{calls}\n"
            f"    {self.accesses} accesses; the first: {who}"
        )


class Checker(Driver):
    """Runs launches and collects their findings and traffic.

    Attributes:
        findings: in the order in which they were found.
        launches_of: how many there were of each kernel.
        traffic: by kernel, place and space.
    """

    def __init__(self, capability: int, multiprocessors: int | None = None) -> None:
        super().__init__(capability, multiprocessors)
        self._memory.anywhere = False
        self.tensors = Tensors()
        self.launches_of: Counter[str] = Counter()
        self.traffic: dict[tuple[str, Place, str], Traffic] = {}
        self._found: dict[tuple[str, str, Place], Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        return list(self._found.values())

    def prepare_memory(self, memory: GlobalMemory, arguments: dict[str, Any]) -> None:
        self.tensors.prepare(memory, arguments)

    def handle(self, report: Report) -> None:
        self.launches_of[report.kernel] += 1
        body = report.of.parsed
        places = {}
        for instruction in (i for block in body.blocks for i in block.instructions):
            lines = [Place(body.files.get(file, ""), line) for file, line in (instruction.line, *instruction.callers)]
            own = [place for place in lines if not place.path.startswith(TRITON)] or lines
            places[body.where(instruction.line), instruction.text] = own
        for fault in report.faults:
            if fault.detail == UNEQUAL:
                continue  # Threads that hold copies of a sum, which Triton's fma rounds in several ways.
            place, *callers = places[fault.where, fault.instruction]
            x, y, _ = report.grid
            program = fault.block % x, fault.block // x % y, fault.block // (x * y)
            finding = Finding(report.kernel, fault.kind, place, tuple(callers), fault, program)
            self._found.setdefault((report.kernel, fault.kind, place), finding).accesses += fault.count
        for (space, where, text), traffic in report.traffic.items():
            key = report.kernel, places[where, text][0], space
            self.traffic.setdefault(key, Traffic()).add(traffic)

    def print(self) -> None:
        """Prints traffic, findings and a line that counts both."""
        print("\n".join(["", *self.table(), *map(str, self.findings)]))
        kernels = ", ".join(f"{name} ({count})" for name, count in self.launches_of.items())
        print(f"{len(self.findings)} findings; launches: {kernels or 'none'}")

    def table(self) -> Iterator[str]:
        """Lines of text: what each line of the source asked of memory."""
        for (kernel, place, space), t in sorted(self.traffic.items(), key=str):
            if t.requests and space.startswith("global"):
                least = max(1, -(-t.bytes // 32 // t.requests))
                yield f"{place}: {kernel}, {space}: {t.sectors / t.requests:.1f} sectors a request of at least {least}"
            elif t.requests:
                yield f"{place}: {kernel}, {space}: {t.sectors / max(1, t.least):.1f} cycles a request without bank conflicts, at worst {t.worst}"


def prefer_first_fitting(self: Autotuner, kwargs: dict[str, Any]) -> list[triton.Config]:
    """In place of an autotuner's benchmark: the first configuration that compiles and fits the GPU."""
    configs: list[triton.Config] = PRUNE(self, kwargs)
    for config in configs:
        given = kwargs | config.all_kwargs() | {"warmup": True}
        if config.pre_hook:
            config.pre_hook(self.nargs | given)
        try:
            self.fn.run(*self.nargs.values(), **given)._init_handles()
        except (OutOfResources, CompileTimeAssertionFailure):
            continue
        return [config]
    return configs[:1]


def run_once(function: Callable[[], Any], *_: Any, quantiles: Any = None, **__: Any) -> Any:
    """In place of triton.testing.do_bench: an interpreter has no times."""
    function()
    return [math.nan] * len(quantiles) if quantiles else math.nan


class Stream:
    """Has nothing to do: launches are over when they return."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...


class Event(Stream):
    """Measures no time, as an interpreter has none."""

    def record(self, stream: object = None) -> None: ...

    def elapsed_time(self, end: object) -> float:
        return math.nan


@contextmanager
def gpu(checker: Checker) -> Iterator[None]:
    """torch and Triton see a GPU that is the CPU and `checker`."""
    arch = checker.target.arch
    properties = types.SimpleNamespace(
        name=f"sm_{arch} interpreter", major=arch // 10, minor=arch % 10, warp_size=WARP, total_memory=1 << 36,
        multi_processor_count=checker.multiprocessors, shared_memory_per_block_optin=SHARED_KB[arch] << 10,
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": divmod(arch, 10),
        "get_device_name": properties.name, "get_device_properties": properties, "is_bf16_supported": True,
        "synchronize": None, "empty_cache": None, "set_device": None, "init": None, "_lazy_init": None,
        "manual_seed": None, "manual_seed_all": None, "is_initialized": True, "is_current_stream_capturing": False,
        "reset_peak_memory_stats": None, "get_rng_state": torch.get_rng_state(),
    }  # fmt: skip
    functions = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    functions |= dict.fromkeys(("device", "device_of", "stream"), nullcontext)
    functions |= dict.fromkeys(("Stream", "current_stream", "default_stream"), Stream) | {"Event": Event}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **functions))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(mock.patch.object(Autotuner, "prune_configs", prefer_first_fitting))
        stack.enter_context(mock.patch.object(Autotuner, "_bench", lambda *_, **__: [0.0] * 3))
        stack.enter_context(mock.patch.object(triton.testing, "do_bench", run_once))
        for context in (checker, checker.tensors, CudaDevices()):
            stack.enter_context(context)
        yield


def run_file(checker: Checker, path: str, arguments: Sequence[str] = ()) -> None:
    """Runs a Python file as `python FILE.py` would, with `checker` as its GPU.

    Raises:
        Unsupported: names an instruction that the interpreter doesn't know. Errors of the file are raised as they are.
    """
    folder = str(Path(path).resolve().parent)
    with mock.patch.object(sys, "argv", [path, *arguments]), mock.patch.object(sys, "path", [folder, *sys.path]):
        with gpu(checker):
            runpy.run_path(path, run_name="__main__")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx_interpreter", description=__doc__.partition("\n")[0])
    parser.add_argument("--sm", type=int, choices=(80, 90), default=80, help="compute capability times ten")
    parser.add_argument("--multiprocessors", type=int, metavar="N", help="of the GPU that the file sees")
    parser.add_argument("file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the file")
    given = parser.parse_args()
    checker = Checker(given.sm, given.multiprocessors)
    try:
        run_file(checker, given.file, given.arguments)
    except Unsupported as error:
        print(f"unsupported: {error}", file=sys.stderr)
        return 2
    finally:
        checker.print()
    return int(bool(checker.findings))


if __name__ == "__main__":
    sys.exit(main())
