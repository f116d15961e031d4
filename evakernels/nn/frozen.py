"""Prepacked weights of linear layers for a CPU, also in 8 bits: for inference."""

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
from .linear import faster_dtypes, matmul_dtypes

Model = TypeVar("Model", bound=nn.Module)

_CPU = torch.device("cpu")
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


class FrozenWeight(Tensor):
    """A linear layer's weight `[out, in]`, prepacked for oneDNN's matmuls; it replaces the dense weight.

    `torch.nn.functional.linear` and `evakernels.nn.linear` multiply by it. Other functions get a new `dense()` copy. A
    pickle holds the dense weight.

    Raises:
        TypeError: for a write and for a view.
        RuntimeError: in a matmul, for an input of another dtype or one that requires a gradient, and in training mode
            with gradients enabled.
    """

    _packed: Tensor
    _scale: Tensor | None
    """Scale of each output in 8 bits, float32 `[out]`."""
    _pieces: dict[Any, tuple["FrozenWeight", ...]]
    _module: Callable[[], nn.Module | None]
    """A weak reference to its module."""
    _layout: tuple[int, int, torch.dtype]
    """Outputs, inputs and dtype: reading them from a tensor subclass takes microseconds."""

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Self:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=_CPU)
        self._packed, self._scale, self._pieces, self._layout = packed, scale, {}, (*shape, dtype)
        self._module = lambda: None
        return self

    @classmethod
    def prepack(cls, weight: Tensor, *, int8: bool = False) -> Self:
        """Prepacks a dense weight, float32 or bfloat16 `[out, in]`, on a CPU."""
        weight = weight.detach()
        if not int8:
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), None, weight.shape, weight.dtype)
        scale = weight.float().abs().amax(1).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        return cls._from_codes((weight.float() / scale.unsqueeze(1)).round_().to(torch.int8), scale, weight.dtype)

    @classmethod
    def _from_codes(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Self:
        return cls(torch.ops.onednn.qlinear_prepack(codes.contiguous(), None), scale, codes.shape, dtype)

    @property
    def is_int8(self) -> bool:
        """Whether the weight is in 8 bits."""
        return self._scale is not None

    def dense(self) -> Tensor:
        """Returns a new dense weight `[out, in]`, dequantized from 8 bits."""
        dense = self._packed.to_dense()
        return dense if self._scale is None else (dense.t() * self._scale.unsqueeze(1)).to(self.dtype).contiguous()

    def rows(self, sizes: tuple[int, ...]) -> tuple["FrozenWeight", ...]:
        """Splits the weight into parts of these numbers of outputs; the parts are cached."""
        if sizes not in self._pieces:
            if self._scale is None:
                parts = [FrozenWeight.prepack(part) for part in self._packed.to_dense().split(sizes)]
            else:
                codes, scales = self._packed.to_dense().t().split(sizes), self._scale.split(sizes)
                parts = [FrozenWeight._from_codes(*part, self.dtype) for part in zip(codes, scales, strict=True)]
            self._pieces[sizes] = tuple(parts)
        return self._pieces[sizes]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiplies `x` `[..., in]`; returns `[..., out]`."""
        if torch.compiler.is_compiling():  # dynamo then breaks the graph and runs the matmul in eager mode
            raise RuntimeError("linear: torch.compile prepacks weights itself (`freezing`): unfreeze the model for it")
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
            raise RuntimeError(f"linear: x must have shape [..., {inputs}], got {list(x.shape)}")
        if x.dtype != dtype:
            raise RuntimeError(
                f"linear: x must be {dtype}, as the frozen weight, got {x.dtype}; freeze a model in the dtype that it "
                "computes in, also under autocast: model.to(torch.bfloat16)"
            )
        if not torch.is_grad_enabled():
            return
        # Dynamo, which may compile this function alone, doesn't support weak references.
        module = None if torch.compiler.is_compiling() else self._module()
        if module is not None and module.training:
            raise RuntimeError(
                "linear: the weight must not be frozen in training mode; evakernels.restore(model) undoes "
                "accelerate(model, freeze=True), evakernels.nn.unfreeze(model) undoes freeze(model)"
            )
        if x.requires_grad:
            raise RuntimeError(
                "linear: x must not require a gradient, as the weight is frozen for inference: call the model under "
                "torch.inference_mode()"
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
        override = _OVERRIDES.get(func)
        if override is not None and (result := override(*args, **kwargs)) is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _ALIASES:
            weight = args[0]
            return cls(weight._packed, weight._scale, weight.shape, weight.dtype)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            if argument.alias_info is not None and isinstance(value, cls):
                written = argument.alias_info.is_write
                raise TypeError(f"{func}: {_FROZEN if written else 'a frozen weight has no views: call dense()'}")
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


_FROZEN = "the weight is frozen; change it before `evakernels.nn.freeze`, or after `unfreeze`"
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def freeze(model: Model, *, int8: bool | Callable[[str], bool] = False) -> Model:
    """Prepacks the weights of a model's linear layers for this CPU, in place: for inference.

    Weights become immutable `FrozenWeight`: load weights before, and `unfreeze` to change them, their dtype or device.
    State dicts hold dense weights. Weights stay dense if prepacking isn't faster: in float16, and in float32 except on
    AMD's processors with AVX-512. So do weights that other modules share, such as tied embeddings. `torch.compile`
    prepacks weights itself (`freezing`).

    Args:
        model: in evaluation mode, on a CPU. The weight of each `torch.nn.Linear` is frozen, unless its class has its
            own forward; in other modules the parameters that their class names in `linear_weights`. Afterwards no
            parameter requires a gradient. A `torch.nn.MultiheadAttention` that `evakernels.accelerate` hasn't replaced
            doesn't change: in bfloat16 torch is several times slower for weights without a gradient.
        int8: compute in 8 bits: weights with a scale for each output, inputs with a scale for each row, int32 sums. A
            function of a parameter's name, as in `named_parameters`, chooses layers.

    Returns:
        The model.

    Raises:
        ValueError: for a model in training mode, on another device, or frozen with another `int8` before.
        RuntimeError: for `int8` on a processor without int8 matmuls (VNNI, AMX).

    Examples:
        >>> model = evakernels.nn.freeze(torch.nn.Linear(4, 8).eval())
        >>> model(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    check(model)
    if int8 and (reason := int8_unsupported_reason()):
        raise RuntimeError(f"freeze: int8 {reason}")
    frozen: dict[Tensor, nn.Parameter] = {}
    weights = list(_weights(model))
    linear_uses = Counter(weight for *_, weight in weights)
    all_uses = Counter(weight for module in model.modules() for weight in module._parameters.values())
    _disable_gradients(model)
    for module, name, weight in weights:
        in_int8 = int8(name) if callable(int8) else int8
        if isinstance(weight, FrozenWeight) and weight.is_int8 != in_int8:
            raise ValueError(f"freeze: int8 must be {weight.is_int8} for the frozen {name}, got {in_int8}: unfreeze it")
        is_tied = all_uses[weight] > linear_uses[weight]
        dtypes = matmul_dtypes() if in_int8 else faster_dtypes()
        if isinstance(weight, FrozenWeight) or is_tied or weight.dtype not in dtypes:
            continue
        if weight not in frozen:
            frozen[weight] = nn.Parameter(FrozenWeight.prepack(weight, int8=in_int8), requires_grad=False)
            frozen[weight]._module = ref(module)  # type: ignore[attr-defined]
        module.register_parameter(name.rpartition(".")[2], frozen[weight])
        if _with_dense_weights not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_with_dense_weights)
    return model


def _disable_gradients(model: nn.Module) -> None:
    """Notes in each module, for `unfreeze`, which of its parameters required a gradient."""
    closed = _parts_of_torch_attention(model)
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and module not in closed
    ]
    for module, name in trainable:  # the list is complete before a tied parameter changes
        module.__dict__.setdefault(_TRAINABLE, set()).add(name)
        module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]


_TRAINABLE = "_evakernels_wanted_gradients"


def check(model: nn.Module) -> None:
    """Raises `ValueError` for a model that `freeze` doesn't support."""
    if model.training:
        raise ValueError("freeze: model must be in evaluation mode, got training mode: call model.eval()")
    for _, name, weight in _weights(model):
        if weight.device.type != "cpu":
            raise ValueError(f"freeze: {name} must be on a CPU, got {weight.device}")


def unfreeze(model: Model) -> Model:
    """Makes frozen weights dense again, in place; returns the model.

    Parameters require gradients if they did before `freeze`. Tied weights stay tied.
    """
    dense: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        trainable = module.__dict__.pop(_TRAINABLE, ())
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, FrozenWeight):
                if weight not in dense:
                    dense[weight] = nn.Parameter(weight.dense(), requires_grad=False)
                module.register_parameter(name, dense[weight])
            if name in trainable:
                module._parameters[name].requires_grad_()  # type: ignore[union-attr]
    return model


def _with_dense_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module._parameters:
        weight = state.get(prefix + name)
        if isinstance(weight, FrozenWeight):
            state[prefix + name] = weight.dense()


@cache
def int8_unsupported_reason() -> str | None:
    """Returns why this machine doesn't support linear layers in 8 bits, or None."""
    if not any(torch.cpu.get_capabilities().get(name) for name in _VNNI):
        return "needs a processor with int8 matmuls: AVX-512 VNNI, AVX-VNNI or AMX"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "needs a torch with oneDNN"
    return None


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name in the model and value of each weight of a linear layer."""
    closed = _parts_of_torch_attention(model)
    for path, module in model.named_modules():
        default_names = ("weight",) if type(module).forward is nn.Linear.forward else ()
        names: tuple[str, ...] = getattr(module, "linear_weights", default_names)
        for name in names if module not in closed else ():
            weight = module._parameters.get(name)
            if weight is not None:
                yield module, f"{path}.{name}".lstrip("."), weight


def _parts_of_torch_attention(model: nn.Module) -> set[nn.Module]:
    """Modules inside torch's own attention, which takes views of its weights."""
    closed = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and not hasattr(m, "linear_weights"))
    return {part for module in closed for part in module.modules()}


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return weight.product(x, bias) if isinstance(weight, FrozenWeight) else NotImplemented


def _split(weight: FrozenWeight, sizes: int | list[int], dim: int = 0) -> Any:
    return weight.rows(tuple(sizes)) if dim == 0 and not isinstance(sizes, int) else NotImplemented


def _refuse_sharing(weight: FrozenWeight) -> None:
    raise TypeError("share_memory: the weight must not be frozen; share the model's memory before `freeze`")


def _attend_densely(*args: Any, **kwargs: Any) -> Any:
    # Calls of torch.nn.MultiheadAttention that `evakernels.accelerate` leaves to torch, such as with a padding mask.
    args, kwargs = tree_map_only(FrozenWeight, FrozenWeight.dense, (args, kwargs))
    return F.multi_head_attention_forward(*args, **kwargs)


def _refuse_data(weight: FrozenWeight, data: Tensor) -> None:
    # `module.to` with the same device sets the same data.
    if not isinstance(data, FrozenWeight) or data._packed is not weight._packed:
        raise TypeError(_FROZEN)


_OVERRIDES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.multi_head_attention_forward: _attend_densely,
    Tensor.split: _split,
    Tensor.share_memory_: _refuse_sharing,
    Tensor.data.__set__: _refuse_data,  # type: ignore[attr-defined]
}
