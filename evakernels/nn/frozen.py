"""Weights of linear layers, laid out once for the products of a CPU, or in 8 bits: for inference."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Self, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import backends
from ..autocast import is_on
from ..ops.row_quantization import dequantize_rows, quantize_rows
from ..reference.row_quantization import LARGEST, ZERO

Model = TypeVar("Model", bound=nn.Module)

_CPU = torch.device("cpu")
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


class FrozenWeight(Tensor):
    """A linear layer's weight `[out, in]` as products take it, in the place of the dense one, which it doesn't keep.

    `torch.nn.functional.linear` and `evakernels.nn.linear` multiply by it. Other functions that read it get `dense()`,
    made anew. Pickled, it is dense.

    Raises:
        TypeError: where it is written to, or a view of it is asked for.
        RuntimeError: in a product with an input of another dtype, or one that wants a gradient, and in training mode
            where gradients are enabled.
    """

    _packed: Tensor
    _scale: Tensor | None
    """Of each output in 8 bits, float32 `[out]`."""
    _pieces: dict[Any, tuple["FrozenWeight", ...]]
    _module: Callable[[], nn.Module | None]
    """Its module, while there is one."""
    _layout: tuple[int, int, torch.dtype]
    """Outputs, inputs and dtype: the properties of a tensor of another class take some microseconds each."""

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Self:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=_CPU)
        self._packed, self._scale, self._pieces, self._layout = packed, scale, {}, (*shape, dtype)
        self._module = lambda: None
        return self

    @classmethod
    def of(cls, weight: Tensor, *, int8: bool = False) -> Self:
        """`weight`, dense, float32 or bfloat16 `[out, in]`, on a CPU."""
        weight = weight.detach()
        if not int8:
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), None, weight.shape, weight.dtype)
        scale = weight.float().abs().amax(1).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        return cls._of_codes((weight.float() / scale.unsqueeze(1)).round_().to(torch.int8), scale, weight.dtype)

    @classmethod
    def _of_codes(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Self:
        return cls(torch.ops.onednn.qlinear_prepack(codes.contiguous(), None), scale, codes.shape, dtype)

    @property
    def is_int8(self) -> bool:
        """Whether it is in 8 bits."""
        return self._scale is not None

    def dense(self) -> Tensor:
        """`[out, in]`, made anew; in 8 bits what these stand for."""
        dense = self._packed.to_dense()
        return dense if self._scale is None else (dense.t() * self._scale.unsqueeze(1)).to(self.dtype).contiguous()

    def rows(self, sizes: tuple[int, ...]) -> tuple["FrozenWeight", ...]:
        """Its parts of so many outputs each; made once."""
        if sizes not in self._pieces:
            if self._scale is None:
                parts = [FrozenWeight.of(part) for part in self._packed.to_dense().split(sizes)]
            else:
                codes, scales = self._packed.to_dense().t().split(sizes), self._scale.split(sizes)
                parts = [FrozenWeight._of_codes(*part, self.dtype) for part in zip(codes, scales, strict=True)]
            self._pieces[sizes] = tuple(parts)
        return self._pieces[sizes]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        if torch.compiler.is_compiling():  # which then leaves what is around it to eager mode
            raise RuntimeError("linear: torch.compile lays out weights itself (`freezing`): unfreeze the model for it")
        if is_on("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        outputs, inputs, dtype = self._layout
        self._check(x, inputs, dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        rows = x if x.dim() == 2 else x.reshape(-1, inputs)
        if not rows.shape[0]:
            y = rows.new_empty(0, outputs)
        elif self._scale is None:
            backends.observe("linear", "oneDNN, packed")
            y = torch.ops.mkldnn._linear_pointwise(rows, self._packed, bias, "none", [], "")
        else:
            backends.observe("linear", "oneDNN, int8")
            y = self._multiply_int8(rows, self._scale, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], outputs)

    def _multiply_int8(self, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        codes, row_scale = quantize_rows(rows)
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO, self._packed, scale, _zeros(len(scale)), None, 1.0, 0, self._layout[2], "none", [], ""
        )  # fmt: skip
        out: Tensor = dequantize_rows(y, row_scale, bias)
        return out

    def _check(self, x: Tensor, inputs: int, dtype: torch.dtype) -> None:
        if x.dim() == 0 or x.shape[-1] != inputs:
            raise RuntimeError(f"linear: x has shape {list(x.shape)}; expected [..., {inputs}]")
        if x.dtype != dtype:
            raise RuntimeError(
                f"linear: a weight that was frozen in {dtype} got {x.dtype}; freeze a model in the dtype that it "
                "computes in, under autocast too, as by model.to(torch.bfloat16)"
            )
        if not torch.is_grad_enabled():
            return
        # torch.compile, which takes this function by itself, knows no weak references.
        module = None if torch.compiler.is_compiling() else self._module()
        if module is not None and module.training:
            raise RuntimeError(
                "linear: the weight must not be frozen in training mode; evakernels.restore(model) undoes "
                "accelerate(model, freeze=True), evakernels.nn.unfreeze(model) undoes freeze(model)"
            )
        if x.requires_grad:
            raise RuntimeError(
                "linear: the weight is frozen, for inference alone, and the input wants a gradient: call the model "
                "under torch.inference_mode()"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FrozenWeight({list(self.shape)}, dtype={self.dtype}, int8={self.is_int8})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        served = _SERVED.get(func)
        if served is not None and (result := served(*args, **kwargs)) is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _ALIASES:
            weight = args[0]
            return cls(weight._packed, weight._scale, weight.shape, weight.dtype)
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            if argument.alias_info is not None and isinstance(given, cls):
                written = argument.alias_info.is_write
                raise TypeError(f"{func}: {_FROZEN if written else 'a frozen weight has no views: see dense()'}")
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


_FROZEN = "the weight is frozen; change it before `evakernels.nn.freeze`, or after `unfreeze`"
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def freeze(model: Model, *, int8: bool | Callable[[str], bool] = False) -> Model:
    """Lays out the weights of a model's linear layers for the products of this CPU, in place, once: for inference.

    In bfloat16 a product of ten rows took 1.3 to 1.5 times as long in torch, of 1,576 rows 1.08 to 1.1 times (AMD EPYC,
    Zen 5, 2 threads, 2026-11-28). Weights become `FrozenWeight`, which nothing can change: load before, and `unfreeze`
    to change them, their dtype or their device. State dicts have dense ones. A weight stays as it is where torch has no
    layout of its own for this processor, or one that isn't faster: float16, and float32 on all but AMD's processors
    with AVX-512; and where another module has it too, such as a tied embedding. `torch.compile` has such layouts
    itself (`freezing`).

    Args:
        model: in evaluation mode, on a CPU. Of each `torch.nn.Linear` the weight is frozen, unless its class has a
            forward of its own, and of other modules the parameters that their class names in `linear_weights`. No
            parameter wants a gradient afterwards but those of a `torch.nn.MultiheadAttention` that
            `evakernels.accelerate` doesn't serve. It stays as it is: torch takes several times as long for it in
            bfloat16 where its weights have no gradient.
        int8: compute in 8 bits: weights with a scale for each output, inputs with one for each row, sums in 32 bits. A
            function tells of the name of a parameter, as in `named_parameters`, whether to.

    Returns:
        The model.

    Raises:
        ValueError: for a model in training mode, on another device, or frozen otherwise before.
        RuntimeError: for `int8` on a processor that has no products of bytes (VNNI, AMX), where they are slow or wrong.

    Examples:
        >>> model = evakernels.nn.freeze(torch.nn.Linear(4, 8).eval())
        >>> model(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    check(model)
    if int8 and (reason := why_not_int8()):
        raise RuntimeError(f"freeze: int8 {reason}")
    frozen: dict[Tensor, nn.Parameter] = {}
    weights = list(_weights(model))
    of_linear = Counter(weight for *_, weight in weights)
    of_all = Counter(weight for module in model.modules() for weight in module._parameters.values())
    _want_no_gradients(model)
    for module, name, weight in weights:
        in_int8 = int8(name) if callable(int8) else int8
        if isinstance(weight, FrozenWeight) and weight.is_int8 != in_int8:
            raise ValueError(f"freeze: {name} is frozen {'in' if weight.is_int8 else 'not in'} int8; unfreeze it first")
        is_tied = of_all[weight] > of_linear[weight]
        if isinstance(weight, FrozenWeight) or is_tied or weight.dtype not in _frozen_dtypes(in_int8):
            continue
        if weight not in frozen:
            frozen[weight] = nn.Parameter(FrozenWeight.of(weight, int8=in_int8), requires_grad=False)
            frozen[weight]._module = ref(module)  # type: ignore[attr-defined]
        module.register_parameter(name.rpartition(".")[2], frozen[weight])
        if _with_dense_weights not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_with_dense_weights)
    return model


def _want_no_gradients(model: nn.Module) -> None:
    """Notes for `unfreeze`, in each module, which of its parameters have wanted one."""
    closed = _parts_of_torch_attention(model)
    wanted = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and module not in closed
    ]
    for module, name in wanted:  # all are noted before a tied one changes
        module.__dict__.setdefault(_WANTED, set()).add(name)
        module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]


_WANTED = "_evakernels_wanted_gradients"


def check(model: nn.Module) -> None:
    """Raises what `freeze` raises for a model that it can't take."""
    if model.training:
        raise ValueError("freeze: the model is in training mode; frozen weights are for inference: model.eval()")
    for _, name, weight in _weights(model):
        if weight.device.type != "cpu":
            raise ValueError(f"freeze: {name} is on {weight.device}; frozen weights are a CPU's")


def unfreeze(model: Model) -> Model:
    """Makes the weights dense again that `freeze` has laid out, in place; returns the model.

    Parameters want gradients if they did before.
    """
    dense: dict[Tensor, nn.Parameter] = {}  # what is tied stays so
    for module in model.modules():
        wanted = module.__dict__.pop(_WANTED, ())
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, FrozenWeight):
                if weight not in dense:
                    dense[weight] = nn.Parameter(weight.dense(), requires_grad=False)
                module.register_parameter(name, dense[weight])
            if name in wanted:
                module._parameters[name].requires_grad_()  # type: ignore[union-attr]
    return model


def _with_dense_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module._parameters:
        weight = state.get(prefix + name)
        if isinstance(weight, FrozenWeight):
            state[prefix + name] = weight.dense()


@cache
def why_not_int8() -> str | None:
    """Why this machine computes no linear layers in 8 bits; None if it does."""
    if not any(torch.cpu.get_capabilities().get(name) for name in _VNNI):
        return "needs a processor with products of bytes: AVX-512 VNNI, AVX-VNNI or AMX"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "needs a torch with oneDNN"
    return None


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Modules, and name in the model and value of their parameters that products of linear layers take."""
    closed = _parts_of_torch_attention(model)
    for path, module in model.named_modules():
        of_torch = ("weight",) if type(module).forward is nn.Linear.forward else ()
        names: tuple[str, ...] = getattr(module, "linear_weights", of_torch)
        for name in names if module not in closed else ():
            weight = module._parameters.get(name)
            if weight is not None:
                yield module, f"{path}.{name}".lstrip("."), weight


def _parts_of_torch_attention(model: nn.Module) -> set[nn.Module]:
    """It takes views of its weights, and of its output layer reads the weight alone."""
    closed = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and not hasattr(m, "linear_weights"))
    return {part for module in closed for part in module.modules()}


def _frozen_dtypes(int8: bool) -> frozenset[torch.dtype]:
    from .linear import multiplied_dtypes, served_dtypes

    return multiplied_dtypes() if int8 else served_dtypes()


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return weight.product(x, bias) if isinstance(weight, FrozenWeight) else NotImplemented


def _split(weight: FrozenWeight, sizes: int | list[int], dim: int = 0) -> Any:
    return weight.rows(tuple(sizes)) if dim == 0 and not isinstance(sizes, int) else NotImplemented


def _refuse_sharing(weight: FrozenWeight) -> None:
    raise TypeError("a frozen weight isn't shared between processes; share the model's memory before it is frozen")


def _attend_densely(*args: Any, **kwargs: Any) -> Any:
    # What `evakernels.accelerate` doesn't serve of a torch.nn.MultiheadAttention, such as a mask of padding.
    args, kwargs = tree_map_only(FrozenWeight, FrozenWeight.dense, (args, kwargs))
    return F.multi_head_attention_forward(*args, **kwargs)


def _refuse_item(weight: Any, *args: Any) -> Any:
    if isinstance(weight, FrozenWeight):
        raise TypeError(_FROZEN)
    return NotImplemented


def _refuse_data(weight: FrozenWeight, data: Tensor) -> None:
    # A module that is moved to where it is sets what it has.
    if not isinstance(data, FrozenWeight) or data._packed is not weight._packed:
        raise TypeError(_FROZEN)


_SERVED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.multi_head_attention_forward: _attend_densely,
    Tensor.split: _split,
    Tensor.__setitem__: _refuse_item,
    Tensor.share_memory_: _refuse_sharing,
    Tensor.data.__set__: _refuse_data,  # type: ignore[attr-defined]
}
