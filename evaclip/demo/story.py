"""The demo: shards, training, evaluation on a new style, the report, and a store to search in."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.errors import UserError

if TYPE_CHECKING:
    from evaclip.eval.results import Evaluation
    from evaclip.train.config import TrainConfig
    from evaclip.train.trainer import Outcome

RECIPE = "emoji"
STYLES = ("twemoji", "openmoji")
BUDGET_MINUTES = 3.2
RUN_FOLDER = Path("runs/demo")
DATA_FOLDER = Path("data/emoji")
STORE_FOLDER = "pictures.store"

_TITLES = {"openmoji": "OpenMoji, a style never seen", "twemoji": "Twemoji, the drawings trained on"}
_IMAGE_SIZE = 64  # twice the model's image size, for the report's gallery
_SPEED_STEPS = 48  # the first ones are slow: images are decoded, memory is taken
_PHASES = ("drawings", "training", "evaluation", "report", "index")
_THUMBNAIL = 128
_BATCH = 256  # of so few tokens each that a smaller batch takes longer

Say = Callable[[str], None]


def run_demo(
    out: Path, *, data: Path = DATA_FOLDER, minutes: float = BUDGET_MINUTES, say: Say = print
) -> tuple[Path, Path]:
    """Trains on Twemoji's drawings, measures on OpenMoji's drawings of the same concepts, and indexes both.

    Args:
        out: the folder of the run; an earlier demo in it is replaced.
        data: where the shards lie; they are drawn if they do not.
        minutes: what the training may take; it is shortened to that where the machine is slow.
        say: receives progress messages.

    Returns:
        The paths of `report.html` and the store.

    Raises:
        UserError: a package of the demo is missing, or `out` holds a run or a store of another kind.
    """
    from evaclip.report import write_report
    from evaclip.train.trainer import train

    if not 0 < minutes < math.inf:
        raise UserError(f"the budget must be more than 0 minutes, got {minutes:g}")
    _check_replaceable(out)
    with _phase("drawings", say):
        draw_shards(data, say)
    with _phase("training", say):
        config = fit_to_budget(demo_config(out, data), minutes, say)
        _stop_if_asked(train(config, overwrite=True))
    with _phase("evaluation", say):
        evaluations = evaluate_run(out, data)
    with _phase("report", say):
        report = write_report(out)
    with _phase("index", say):
        store = index_drawings(out, data)
    for line in summary(evaluations):
        say(line)
    return report, store


@contextmanager
def _phase(name: str, say: Say) -> Iterator[None]:
    """Says that a phase begins and, once it has ended, how long it took."""
    label = f"[{_PHASES.index(name) + 1}/{len(_PHASES)}] {name}"
    say(f"{label} ...")
    started = time.monotonic()
    yield
    say(f"{label}: {time.monotonic() - started:.1f} s")


def draw_shards(data: Path, say: Say = print) -> None:
    """Makes sure that `data` holds the shards of both styles."""
    from evaclip.demo.emoji import build_emoji

    # The list of classes is written after the shards: where it is, they are complete.
    if (data / "classes.txt").is_file() and all(any(data.glob(f"{style}-*.tar")) for style in STYLES):
        say(f"the shards in {data} are there already")
        return
    say(f"drawing the images of {' and '.join(STYLES)} into {data}")
    build_emoji(data, STYLES, size=_IMAGE_SIZE)


def demo_config(out: Path, data: Path) -> "TrainConfig":
    """The recipe, reading from `data` and writing to `out`; the evaluation is left to the demo."""
    from evaclip.machine import multiplies_bfloat16
    from evaclip.train.config import EvalConfig
    from evaclip.train.recipes import get_recipe

    config = get_recipe(RECIPE)
    shards = replace(config.data, train=str(data / "twemoji-*.tar"))
    # The report shows the same curves, and the demo goes without a package.
    log = replace(config.log, tensorboard=False)
    precision = "amp_bf16" if multiplies_bfloat16() else config.precision
    config = replace(config, precision=precision, data=shards, log=log, eval=EvalConfig())
    return replace(config, name=out.name, output=str(out.parent))


def fit_to_budget(config: "TrainConfig", minutes: float, say: Say = print) -> "TrainConfig":
    """The configuration with as many steps as `minutes` allow on this machine, but no more than planned."""
    from evaclip.data import open_configured
    from evaclip.train.schedule import total_steps

    planned = total_steps(config.schedule, config.batch_size, len(open_configured(config.data)))
    affordable = int(_steps_per_second(config) * 60 * minutes)
    if affordable >= planned:
        return config
    steps = max(1, affordable)
    say(f"{planned:,} steps would take longer than {minutes:g} minutes here: training for {steps:,}")
    schedule = config.schedule
    warmup = schedule.warmup_steps * steps // planned
    return replace(config, schedule=replace(schedule, steps=steps, epochs=None, warmup_steps=warmup))


def _steps_per_second(config: "TrainConfig") -> float:
    """Measured by the first steps of the same run, elsewhere."""
    from evaclip.runs.files import LOG_FILE
    from evaclip.runs.log import read_log
    from evaclip.train.config import LogConfig
    from evaclip.train.trainer import train

    schedule = replace(config.schedule, steps=_SPEED_STEPS, epochs=None)
    log = LogConfig(every_steps=_SPEED_STEPS // 3, tensorboard=False, progress="none")
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(replace(config, output=folder, schedule=schedule, log=log))
        _stop_if_asked(outcome)
        last: dict[str, Any] = read_log(outcome.folder / LOG_FILE)[-1]
    return float(last["samples_per_second"]) / config.batch_size


def evaluate_run(run: Path, data: Path) -> list["Evaluation"]:
    """Zero-shot classification of both styles and retrieval on the unseen one, kept in the folder of the run."""
    import torch

    from evaclip.data import open_source
    from evaclip.eval.runs import Setting, run_retrieval, run_zero_shot, store
    from evaclip.eval.zero_shot import load_classnames
    from evaclip.loading import load_model

    loaded = load_model(str(run), device="cuda" if torch.cuda.is_available() else "cpu")
    classnames = load_classnames(data / "classes.txt")
    evaluations = []
    for style in reversed(STYLES):
        path = str(data / f"{style}-*.tar")
        evaluations.append(run_zero_shot(Setting(loaded, path, open_source(path), _TITLES[style]), classnames, ["{}"]))
        store(run, evaluations[-1])
    path = str(data / "openmoji-*.tar")
    all_names = open_source(path, caption_key="json:captions")
    retrieval, gallery = run_retrieval(Setting(loaded, path, all_names, _TITLES["openmoji"]))
    store(run, retrieval, gallery)
    return [*evaluations, retrieval]


def index_drawings(run: Path, data: Path) -> Path:
    """Puts the drawings of both styles into the run's store, by its weights, in place of an earlier demo's store."""
    from evaclip.data import open_source
    from evaclip.runtime.encoder import Encoder
    from evaclip.runtime.indexing import describe, index
    from evaclip.runtime.store import Store
    from evaclip.runtime.text import save_text_tower

    folder = run / STORE_FOLDER
    encoder = Encoder(str(run), precision="fp32", batch_size=_BATCH)
    shards = "::".join(str(data.absolute() / f"{style}-*.tar") for style in STYLES)
    source = open_source(shards, image_key="large.png", caption_key="json:captions", captions=False)
    # Next to the run: no program may be written into one, and the earlier store stays until this one is complete.
    with tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=run.absolute().parent) as temporary:
        made = Path(temporary) / "made"
        with Store.create(made, {"given": str(run.resolve()), **describe(encoder)}) as store:
            if find_spec("onnx") and find_spec("onnxruntime"):
                save_text_tower(store, encoder.model)
            index(source, encoder, store, thumbnail=_THUMBNAIL)
        if folder.exists():
            folder.rename(Path(temporary) / "earlier")
        made.rename(folder)
    return folder


def summary(evaluations: Sequence["Evaluation"]) -> list[str]:
    """The zero-shot results against chance, as the lines of a table."""
    zero_shot = [evaluation for evaluation in evaluations if evaluation.task == "zero-shot"]
    header = f"zero-shot, {zero_shot[0].metrics['classes']:,} classes"
    return [
        f"{header:<34}{'top-1':>23}{'top-5':>23}",
        *(
            f"{each.title:<34}{_against_chance(each.metrics, 'top1'):>23}{_against_chance(each.metrics, 'top5'):>23}"
            for each in zero_shot
        ),
    ]


def _against_chance(metrics: dict[str, Any], name: str) -> str:
    share, chance = metrics[name], metrics[f"chance_{name}"]
    return f"{share:.2%} ({share / chance:,.0f} x chance)"


def _stop_if_asked(outcome: "Outcome") -> None:
    if outcome.stopped_by is not None:
        raise SystemExit(outcome.stopped_by)


def _check_replaceable(out: Path) -> None:
    """Raises UserError if a run or a store would be lost that isn't a demo's."""
    from evaclip.runs.files import CONFIG_FILE
    from evaclip.runs.log import load_yaml
    from evaclip.runtime.store import Store

    path, store = out / CONFIG_FILE, out / STORE_FOLDER
    if path.is_file() and load_yaml(path).get("model", {}).get("name") != RECIPE:
        raise UserError(f"{str(out)!r} holds another run, which the demo would replace: choose another folder by --out")
    if not store.exists():
        return
    if Store.exists(store):
        with Store.open(store) as earlier:
            if earlier.model.get("name") == RECIPE:
                return
    raise UserError(f"{str(store)!r} isn't a demo's store, and the demo would replace it: choose another --out")
