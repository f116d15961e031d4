"""A GPU that is the CPU, for a Python program: torch's devices and the memory of its tensors, Triton's autotuner."""

import math
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.language.semantic import TritonSemantic
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

from ptx_interpreter import GlobalMemory
from ptx_interpreter.gpus import REGISTERS
from ptx_interpreter.memory import Interval, Shadow
from ptx_interpreter.rounding import POISON
from ptx_interpreter.triton_driver import Driver
from ptx_interpreter.types import WARP

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ANSWERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.get_device: 0,
    torch.Tensor.is_pinned: False,
    torch.Tensor.record_stream: None,
}
"""Properties and methods of tensors that name the device, and what a tensor of the GPU returns."""
LOAD = TritonSemantic.load
PRUNE, ENGINE = Autotuner.prune_configs, torch.autograd._engine_run_backward  # type: ignore[attr-defined]
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
"""torch's operators that return memory which nobody has written."""


class CudaDevices(TorchFunctionMode):
    """All tensors say that they are on a GPU, and are on the CPU: only copies to the host are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            return ANSWERS[func]
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.cpu:
            return args[0].clone()
        options = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        args = [CPU if isinstance(arg, torch.device) and arg.type == "cuda" else arg for arg in args]
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args[1] = CPU
        if options.get("device") is not None and str(options["device"]) != "meta":
            options["device"] = CPU
        return func(*args, **options)


class Tensors(TorchDispatchMode):
    """The memory of all tensors, and which of it has been written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, Interval]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if getattr(options.get("device"), "type", "") == "cuda":  # of torch.set_default_device
            options["device"] = CPU
        result = func(*args, **options)
        is_empty = func.overloadpacket.__name__ in EMPTY
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.storage_interval(value, written=not is_empty)
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else options.get(argument.name)
                for each in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(each, torch.Tensor):
                        self._mark_written(each)
        return result

    def storage_interval(self, tensor: torch.Tensor, *, written: bool = True) -> Interval | None:
        """The memory of a tensor's storage; `written` matters for a storage that wasn't known."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        entry = self._storages.get(start)
        if entry and entry[0].cdata == storage._cdata and not entry[0].expired() and entry[1].end == start + size:
            return entry[1]
        if not size:
            return None
        interval = Interval(start, start + size)
        if not written:
            interval.shadow = Shadow.allocate(size, min(tensor.itemsize, 8), written=False)
        self._storages[start] = StorageWeakRef(storage), interval
        return interval

    def _mark_written(self, tensor: torch.Tensor) -> None:
        interval = self.storage_interval(tensor)
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
        self._storages = {start: each for start, each in self._storages.items() if not each[0].expired()}
        for _, earlier in self._storages.values():
            earlier.name = ""  # of an earlier launch
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and (interval := self.storage_interval(tensor)):
                interval.name = name
                size = interval.end - interval.start
                interval.shadow = interval.shadow or Shadow.allocate(size, min(tensor.itemsize, 8), written=True)
        memory.hold([interval for _, interval in self._storages.values()])


def load_or_poison(self: TritonSemantic[Any], ptr: Any, mask: Any, other: Any, *options: Any) -> Any:
    """Replaces TritonSemantic.load: without `other` masked-off lanes of floats have POISON."""
    kind = ptr.type.scalar
    if mask is not None and other is None and kind.is_ptr():
        element = kind.element_ty
        if element.is_floating() and element.primitive_bitwidth >= 16:
            other = self.scalar_constant(float(POISON.view(np.float32)), triton.language.float32)
    return LOAD(self, ptr, mask, other, *options)


def first_fitting(self: Autotuner, kwargs: dict[str, Any]) -> list[triton.Config]:
    """Replaces Autotuner.prune_configs, so that none is timed: returns the first that compiles and fits the GPU."""
    configs: list[triton.Config] = PRUNE(self, kwargs)
    for config in configs:
        options = kwargs | config.all_kwargs() | {"warmup": True}
        if config.pre_hook:
            config.pre_hook(self.nargs | options)
        try:
            self.fn.run(*self.nargs.values(), **options)._init_handles()
        except (OutOfResources, CompileTimeAssertionFailure):
            continue
        return [config]
    return configs[:1]


def run_backward(*args: Any, **kwargs: Any) -> Any:
    """The backward pass: its functions run within a call of torch, which switches the mode off."""
    with CudaDevices():
        return ENGINE(*args, **kwargs)


def run_once(function: Callable[[], Any], *_: Any, quantiles: Any = None, **__: Any) -> Any:
    """Replaces triton.testing.do_bench: an interpreter has no times."""
    function()
    return [math.nan] * len(quantiles) if quantiles else math.nan


class Context(nullcontext[None]):
    """torch.cuda.device(0) and the like."""

    idx = 0


class Stream:
    """A stream of launches that are over when they return; also an event, which has no times."""

    cuda_stream, device = 0, CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self, *_: Any) -> None: ...

    wait_stream = wait_event = record = record_event = synchronize

    def elapsed_time(self, end: object) -> float:
        return math.nan


@contextmanager
def gpu(driver: Driver, tensors: Tensors) -> Iterator[None]:
    """torch and Triton see a GPU that is the CPU and `driver`."""
    arch, shared = driver.target.arch, driver.gpu.shared_kb << 10
    properties = types.SimpleNamespace(
        name=f"sm_{arch} interpreter", major=arch // 10, minor=arch % 10, warp_size=WARP, total_memory=1 << 36,
        multi_processor_count=driver.multiprocessors, shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024, L2_cache_size=driver.gpu.l2_mb << 20,
        regs_per_multiprocessor=REGISTERS, max_threads_per_multi_processor=driver.gpu.warps * WARP,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_capability": divmod(arch, 10), "get_device_name": properties.name,
        "get_device_properties": properties, "is_current_stream_capturing": False,
    }  # fmt: skip
    silent = ("synchronize", "empty_cache", "set_device", "init", "_lazy_init", "manual_seed", "manual_seed_all")
    answers |= dict.fromkeys(silent)
    functions: dict[str, Any] = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    functions |= dict.fromkeys(("device", "device_of", "stream"), Context)
    functions |= dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), Stream)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **functions))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0))
        stack.enter_context(
            mock.patch.multiple(Autotuner, prune_configs=first_fitting, _bench=lambda *_, **__: [0.0] * 3)
        )
        stack.enter_context(mock.patch.object(triton.testing, "do_bench", run_once))
        stack.enter_context(mock.patch.object(TritonSemantic, "load", load_or_poison))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        for context in (driver, tensors, CudaDevices()):
            stack.enter_context(context)
        yield
