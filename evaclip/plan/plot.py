"""The savings as a picture: stacked bars of memory and of time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from evaclip.atomic import require_writable
from evaclip.errors import UserError
from evaclip.plan.memory import OPTIMIZER
from evaclip.plan.phases import WORKING
from evaclip.plan.recorder import CASTS, COMMUNICATION, GRADIENTS, PARAMETERS
from evaclip.plan.savings import Rung
from evaclip.plan.time_tables import kinds, middle
from evaclip.report.theme import PALETTE, STYLE

_GIB = 2**30
_GROUPS = {
    "parameters": (PARAMETERS, CASTS),
    "gradients": (GRADIENTS,),
    "optimizer state": (OPTIMIZER,),
    "activations": (),
    "loss": ("loss",),
    "communication": (COMMUNICATION,),
    "working memory, inputs": (WORKING, "inputs", "features"),
}
_COLOURS = ("#2757c4", "#6f92de", "#a9bfee", "#1a8a4f", "#c2571a", "#8a6fc4", "#d5d9de")


_CUT = 6.0
"""What is longer than so many times what matters, the last bar or the GPU's memory, is cut and says how long it is."""


def check_plot(path: Path) -> None:
    """Raises a UserError for a file that `save_plot` could not write, before anything is computed for it."""
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise UserError(f"the picture {str(path)!r} can't be written; its name must end in {', '.join(sorted(known))}")
    require_writable(path, make_folder=False)


def save_plot(rungs: Sequence[Rung], path: Path, limit_gib: float) -> None:
    """Writes the picture; its format follows from the file's name.

    Args:
        limit_gib: memory of the GPU, drawn as a line.

    Raises:
        UserError: the file can't be written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.6 + 0.42 * len(rungs)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        memory = {name: [_of_group(rung, name) / _GIB for rung in rungs] for name in _GROUPS}
        _bars(left, rungs, memory, "GiB of one GPU at its peak; dotted: what it has", limit_gib)
        left.axvline(limit_gib, color=PALETTE.ink, linewidth=0.9, linestyle=":")
        times = {name: [middle(rung.time.terms[name]) for rung in rungs] for name in rungs[0].time.terms}
        _bars(right, rungs, times, "seconds of a step, without overlap")
        try:
            figure.savefig(path, dpi=150)
        except OSError as exc:
            raise UserError(f"the picture {str(path)!r} can't be written ({exc.strerror})") from exc


def _of_group(rung: Rung, name: str) -> int:
    def belongs(kind: str) -> bool:
        return kind in _GROUPS[name] or (name == "activations" and kind.startswith("activations"))

    return sum(size for kind, size in kinds(rung).items() if belongs(kind))


def _bars(axes: Axes, rungs: Sequence[Rung], parts: dict[str, list[float]], label: str, least: float = 0.0) -> None:
    rows, starts = range(len(rungs)), [0.0] * len(rungs)
    for (name, values), colour in zip(parts.items(), _COLOURS, strict=False):
        axes.barh(rows, values, left=starts, height=0.62, color=colour, label=name)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    end = min(1.12 * max(starts), _CUT * max(starts[-1], least))
    for row, total in zip(rows, starts, strict=True):
        is_cut = total > end
        text = f"{total:,.0f}" if total >= 100 else f"{total:.3g}"
        colour, side = (PALETTE.paper, "right") if is_cut else (PALETTE.ink, "left")
        axes.text(min(total, end), row, f"{text} → " if is_cut else f" {text}", va="center", ha=side, color=colour)
    axes.set_yticks(rows, [("+ " if index else "") + rung.name for index, rung in enumerate(rungs)])
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
