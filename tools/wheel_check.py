"""Check the installed evakernels: one op of each family, forward and backward, on the compiled library.

Results are compared with the reference. Only `adamw` is left out, which has no compiled CPU kernel. Forward mode,
functorch's transforms and `torch.compile` follow, as they use parts of torch that differ between its versions. Print
`evakernels.info()`, the families and the package's file as a line of JSON. Run it as `python -I tools/wheel_check.py`.
"""

import json
import sys
from collections.abc import Callable

import torch

import evakernels
from evakernels.ops.row_quantization import dequantize_rows, quantize_rows


def features() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)


@torch.no_grad()
def lamb_step(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    param, state = param.detach().clone(), torch.zeros(2, *param.shape)
    arguments = ([param], [grad], [state[0]], [state[1]], [torch.zeros(())], [0.1], [0.01])
    evakernels.lamb_step(*arguments, betas=(0.9, 0.98), eps=1e-6)
    return param


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return evakernels.packed_attention(q, k, v, torch.tensor([0, 2, 5], dtype=torch.int32), max_seqlen=3)


@torch.no_grad()
def quantized(x: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize_rows(x)
    return dequantize_rows(codes.float() - 128, scale, None)


def norms(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = evakernels.layer_norm(x, weight, bias)
    return torch.stack((y, *evakernels.add_layer_norm(x, residual, weight, bias)))


def cases() -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Return by family a function and its tensor arguments, which get gradients."""
    x, weight, bias, scale = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16), torch.tensor(10.0)
    heads, rows = [torch.randn(2, 3, 5, 8) for _ in range(3)], [torch.randn(5, 3, 8) for _ in range(3)]
    mlp = [x, *(torch.randn(shape) / 4 for shape in ((24, 16), (24, 16), (16, 24)))]
    kept = torch.tensor([[0, 2], [1, 4], [3, 4]])
    image = torch.randint(256, (9, 7, 3), dtype=torch.uint8)
    return {
        "contrastive": (evakernels.clip_loss, [features(), features(), scale]),
        "gelu": (evakernels.gelu, [x, bias]),
        "lamb": (lamb_step, [x, torch.randn_like(x)]),
        "layer_norm": (norms, [x, torch.randn_like(x), weight, bias]),
        "packed_attention": (packed, rows),
        "resize": (lambda: evakernels.image.resize(image, (4, 5)).float(), []),
        "rope_attention": (evakernels.rope_attention, heads),
        "row_quantization": (quantized, [x]),
        "swiglu": (evakernels.swiglu, [x, torch.randn_like(x), weight, bias]),
        "swiglu_mlp": (evakernels.swiglu_mlp, mlp),
        "token_dropout": (lambda patches: evakernels.token_dropout(patches, kept), [x]),
    }


def results(backend: str, run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the function's result and, if it is differentiable, the gradients."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    with evakernels.use_backend(backend):
        out = run(*inputs)
        gradients = torch.autograd.grad(out.square().sum(), inputs) if out.requires_grad else ()
    return [out.detach(), *gradients]


def check_transforms() -> None:
    """Compare derivatives and compiled results with those of torch's layer norm."""
    x, tangent, weight, bias = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (16,), weight, bias)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return evakernels.layer_norm(x, weight, bias)

    def gradient(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return torch.func.grad(lambda x: norm(x).square().sum())

    for expected, result in (
        (torch.func.jvp(theirs, (x,), (tangent,)), torch.func.jvp(ours, (x,), (tangent,))),
        (torch.func.vmap(gradient(theirs))(x), torch.func.vmap(gradient(ours))(x)),
        (torch.func.hessian(theirs)(x[0, :2]), torch.func.hessian(ours)(x[0, :2])),
        (theirs(x), torch.compile(ours, fullgraph=True, backend="aot_eager")(x)),
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    torch.manual_seed(0)
    families = cases()
    for run, inputs in families.values():
        torch.testing.assert_close(results("cpu", run, inputs), results("reference", run, inputs), rtol=1e-4, atol=1e-5)
    check_transforms()
    info = evakernels.info()
    print(json.dumps(info | {"ops": list(families), "file": evakernels.__file__}))
    sys.exit(None if info["native"]["loaded"] else info["native"]["reason"])


if __name__ == "__main__":
    main()
