"""Compares `accelerate` and `attn_implementation="evakernels"` with untouched models of three libraries.

    python tests/sweep_dropin.py [--library timm] [--only 'vit_*' ...] [--jobs 2] [--json results.json]

The checks of a model: outputs and gradients, padding masks at every position, hooks, bfloat16 autocast, deepcopy,
torch.compile, `restore`, and attention by name. Models that differ, that evakernels refuses or that can't be built are
printed with the reason. The exit status is 1 if one differs.
"""

import argparse
import copy
import resource
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from sweep_models import LIBRARIES, Inputs, Refused, draw, excepted, first_line, run
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks
from torch.utils._pytree import tree_leaves

import evakernels
import evakernels.transformers
from evaclip.atomic import write_json
from evakernels.dropin.transformers import _reads_no_padding as reads_no_padding

LIMIT, LIMIT_BF16 = 2e-4, 5e-2
"""Largest error, relative to the largest value of the same tensor."""
MOST_MEMORY = 16 << 30
COMPILED_SHARE = 8
"""One in so many models is also compiled."""


class Differs(Exception):
    """A value of the accelerated model is wrong."""


# --- helpers ----------------------------------------------------------------------------------------------------------


def randomize(model: nn.Module) -> None:
    """Weights of such sizes that every layer matters; new models often start with near-zero ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.7 * max(1, parameter[0].numel()) ** -0.5, generator=generator)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs in training mode, and gradients of the parameters."""
    model.train().zero_grad()
    outputs = run(model, inputs)
    losses = [(output * draw(*output.shape)).sum() for output in outputs if output.requires_grad]
    if losses:
        sum(losses).backward()  # type: ignore[union-attr]
    model.eval()
    return outputs, [torch.zeros(1) if p.grad is None else p.grad for p in model.parameters()]


def error_of(ours: list[Tensor], theirs: list[Tensor], floor: float = 0.0) -> float:
    """The largest error of a tensor, relative to its largest value, or to `floor` times the largest of all."""
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        raise Differs(f"shapes {[tuple(o.shape) for o in ours]} instead of {[tuple(t.shape) for t in theirs]}")
    largest = [each.detach().nan_to_num(0, 0, 0).abs().amax().item() if each.numel() else 0 for each in theirs]
    worst = 0.0
    for our, their, scale in zip(ours, theirs, largest, strict=True):
        same = (our == their) | (our.isnan() & their.isnan())
        differences = (our.float() - their.float()).abs()[~same]
        if differences.numel():
            error = differences.max().item() / max(scale, floor * max(largest), 1e-30)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def calls_of(model: nn.Module, inputs: Inputs, everywhere: bool) -> list[tuple[str, Any, Any]]:
    """What forward hooks see of a call: modules in their order, and shapes of their inputs and outputs.

    `everywhere`: hooks of all modules instead of hooks on each module of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    seen: list[tuple[str, Any, Any]] = []

    def shapes(values: object) -> list[tuple[int, ...]]:
        return [tuple(each.shape) for each in tree_leaves(values) if isinstance(each, Tensor)]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((names.get(module, f"<{type(module).__name__}>"), shapes(args), shapes(output)))

    if everywhere:
        handles = [torch_hooks.register_module_forward_hook(hook)]
    else:
        handles = [module.register_forward_hook(hook) for module in names]
    try:
        with torch.no_grad():
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- checks -----------------------------------------------------------------------------------------------------------


class Checks:
    """Compares a model with the untouched one.

    Attributes:
        count: how many comparisons there were.
        wrong: one message for each that failed.
    """

    def __init__(self, reference: nn.Module, calls: dict[str, Inputs]) -> None:
        self.reference, self.calls = reference, calls
        with torch.no_grad():
            self.expected = {name: run(reference, inputs) for name, inputs in calls.items()}
        self.count = 0
        self.wrong: list[str] = []

    def check(self, name: str, function: Callable[[], object]) -> None:
        self.count += 1
        try:
            function()
        except Differs as error:
            self.wrong.append(f"{name}: {error}")
        except TimeoutError:
            raise
        except Exception as error:
            self.wrong.append(f"{name}: {first_line(error)}")

    def perturbed(self) -> nn.Module:
        """The untouched model with weights that are changed by one part in a million.

        A model whose values change by much shows no error of another one.
        """
        model = copy.deepcopy(self.reference)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
        return model

    def outputs(self, model: nn.Module, call: str, limit: float = LIMIT) -> None:
        theirs = self.expected[call]
        with torch.no_grad():
            ours = run(model, self.calls[call])
            error = error_of(ours, theirs)
            is_stable = error <= limit or error_of(run(self.perturbed(), self.calls[call]), theirs) <= LIMIT / 4
        if error > limit and is_stable:
            mask = self.calls[call].get("attention_mask")
            where = ""
            if mask is not None:
                fits = [a.shape[:2] == mask.shape for a in theirs]
                real = [
                    [a[mask.bool()] if fit else a for a, fit in zip(each, fits, strict=True)] for each in (ours, theirs)
                ]
                where = " at padded positions alone" if error_of(*real) <= limit else " at real positions too"
                if error_of(*real) <= limit and reads_no_padding(type(self.reference)):
                    return  # docs/dropin.md names these classes; they are zero there
            raise Differs(f"outputs differ by {error:.1e}{where}")

    def training(self, model: nn.Module) -> None:
        try:
            theirs = gradients(copy.deepcopy(self.reference), self.calls["plain"])
        except TimeoutError:
            raise
        except Exception:
            return  # the untouched model doesn't train on these inputs
        ours = gradients(copy.deepcopy(model), self.calls["plain"])
        limits = {"outputs in training": LIMIT, "gradients": 5 * LIMIT}
        for index, (what, limit) in enumerate(limits.items()):
            error = error_of(ours[index], theirs[index], floor=0.01)
            if error > limit:
                changed = gradients(self.perturbed(), self.calls["plain"])[index]
                if error_of(changed, theirs[index], floor=0.01) <= limit / 4:
                    raise Differs(f"{what} differ by {error:.1e}")

    def hooks(self, model: nn.Module, everywhere: bool) -> None:
        ours, theirs = (calls_of(each, self.calls["plain"], everywhere) for each in (model, self.reference))
        if ours != theirs:
            pairs = ((our, their) for our, their in zip(ours, theirs, strict=False) if our != their)
            our, their = next(pairs, (f"{len(ours)} calls", f"{len(theirs)} calls"))
            raise Differs(f"hooks see {our} instead of {their}")

    def bfloat16(self, model: nn.Module) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            try:
                theirs = run(self.reference, self.calls["plain"])
            except TimeoutError:
                raise
            except Exception:
                return  # the untouched model doesn't run
            ours = run(model, self.calls["plain"])
        error = error_of(ours, theirs)
        own = error_of(theirs, self.expected["plain"])
        if error > max(LIMIT_BF16, 2 * own):  # bfloat16 itself may change this model more
            raise Differs(f"outputs in bfloat16 differ by {error:.1e}, bfloat16 changes them by {own:.1e}")

    def compiled(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        try:
            torch.compile(self.reference, backend="aot_eager")(**self.calls["plain"])
        except TimeoutError:
            raise
        except Exception:
            return  # the untouched model doesn't compile
        self.outputs(torch.compile(model, backend="aot_eager"), "plain")  # type: ignore[arg-type]


def check_model(library: str, name: str, limit: int) -> dict[str, Any]:
    """The record of a model: state "right", "differs" or "refused", reasons, number of comparisons, seconds."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    record: dict[str, Any] = {"library": library, "model": name, "state": "right", "reasons": [], "checks": 0}

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {limit} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        with excepted("construction"):
            reference, calls = LIBRARIES[library][1](name)
        compare(library, name, reference.eval(), calls, record)
    except (Refused, TimeoutError) as error:
        record |= {"state": "refused", "reasons": [str(error)]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    record["state"] = "differs" if record.get("wrong") else record["state"]
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def compare(library: str, name: str, reference: nn.Module, calls: dict[str, Inputs], record: dict[str, Any]) -> None:
    """Runs all checks of a model."""
    before = copy.deepcopy(reference.state_dict())
    randomize(reference)
    with excepted("untouched model"), torch.no_grad():
        if not all(output.isfinite().all() for output in run(reference, calls["plain"])):
            reference.load_state_dict(before)
        checks = Checks(reference, calls)
    model = copy.deepcopy(reference)
    with excepted("accelerate"):
        record["report"] = evakernels.accelerate(model, force=True).headline
    for call in calls:
        checks.check(call, lambda call=call: checks.outputs(model, call))
    checks.check("training", lambda: checks.training(model))
    for where, everywhere in (("hooks", False), ("global hooks", True)):
        checks.check(where, lambda everywhere=everywhere: checks.hooks(model, everywhere))
    checks.check("autocast", lambda: checks.bfloat16(model))
    checks.check("deepcopy", lambda: checks.outputs(copy.deepcopy(model), "plain"))
    if zlib.crc32(name.encode()) % COMPILED_SHARE == 0:
        checks.check("compile", lambda: checks.compiled(model))
    evakernels.restore(model)
    checks.check("restore", lambda: checks.outputs(model, "plain", limit=0.0))
    if library == "transformers":
        by_name(name, checks, record)
    record |= {"checks": checks.count, "wrong": checks.wrong}


def by_name(name: str, checks: Checks, record: dict[str, Any]) -> None:
    """Attention by name against sdpa; where transformers refuses sdpa, the name must be refused too."""
    from transformers import AutoModel

    def build(implementation: str) -> nn.Module:
        model: nn.Module = AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        return model

    config: Any = copy.deepcopy(checks.reference.config)
    config._attn_implementation = None
    try:
        build("sdpa")
        refuses = ""
    except Exception as error:
        refuses = first_line(error)
    try:
        model = build("evakernels")
    except Exception as error:
        has_own_table = isinstance(error, KeyError)  # the model looks up its own classes by the name
        record["reasons"].append(f"by name refused: {refuses or first_line(error)}")
        if not (refuses or has_own_table):
            checks.wrong.append(f"by name: sdpa is accepted, evakernels refused: {first_line(error)}")
        return
    if refuses:
        checks.check("by name", lambda: fail("evakernels is accepted, sdpa refused"))
        return
    model.load_state_dict(checks.reference.state_dict())
    for call in checks.calls:
        checks.check(f"by name, {call}", lambda call=call: checks.outputs(model, call))


def fail(message: str) -> None:
    raise Differs(message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, help="one library; default: all three")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=["*"], help="fnmatch patterns of model names")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--limit", type=int, default=120, metavar="SECONDS", help="of a model's CPU time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the records go")
    given = parser.parse_args()
    chosen = [given.library] if given.library else list(LIBRARIES)
    todo = [(library, name) for library in chosen for name in LIBRARIES[library][0]()]
    todo = [(*each, given.limit) for each in todo if any(fnmatchcase(each[1], pattern) for pattern in given.only)]
    if not todo:
        parser.error(f"--only: no model matches {' '.join(given.only)}")
    records = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for record in pool.map(check_model, *zip(*todo, strict=True)):
            records.append(record)
            for reason in [*record.get("wrong", ()), *record["reasons"]]:
                print(f"{record['state']:8} {record['library']} {record['model']}: {reason}", flush=True)
            if given.json:
                write_json(given.json, records)
    print(f"\n{'library':14}{'models':>8}{'right':>8}{'differs':>9}{'refused':>9}{'checks':>8}")
    for library in chosen:
        own = [record for record in records if record["library"] == library]
        states = Counter(record["state"] for record in own)
        numbers = len(own), states["right"], states["differs"], states["refused"], sum(r["checks"] for r in own)
        print("{:14}{:8}{:8}{:9}{:9}{:8}".format(library, *numbers))
    return int(any(record["state"] == "differs" for record in records))


if __name__ == "__main__":
    sys.exit(main())
