"""A recorded step as a list of phases, and the same list for a model with more blocks."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaclip.plan.operators import Cost
from evaclip.plan.recorder import CASTS, COMMUNICATION, GRADIENTS, INPUTS, PARAMETERS, Recording

WORKING = "working memory"
TEACHER = "teacher"
UNCAST = "autocast.end"
"""The phase in which weights in 16 bits go that nothing has kept for the backward pass."""
_STAYS = (PARAMETERS, INPUTS, GRADIENTS, COMMUNICATION)

Bytes = Counter[str]
Costs = Counter[tuple[str, Cost]]
"""How many calls of each cost there are in `teacher`, `forward`, `backward` and `recomputation`."""


@dataclass(frozen=True)
class Phase:
    """A part of a step, in bytes of each kind.

    Attributes:
        kept: what it leaves behind more than it found.
        peak: what there is more than at its beginning, at the moment when there is most in all.
    """

    name: str
    kept: Bytes
    peak: Bytes
    costs: Costs

    @property
    def is_backward(self) -> bool:
        return self.name.startswith("~")


@dataclass(frozen=True)
class Steps:
    """A step: what is there before it begins, by kind, and its phases."""

    start: Bytes
    phases: tuple[Phase, ...]

    def costs(self, accumulation: int, again: bool) -> Costs:
        """Of all chunks of a step; `again`: each of several has passed forward once before."""
        first, last = self._costs_of_chunks()
        if accumulation == 1:
            return last
        total: Costs = Counter()
        for key, calls in last.items():
            total[key] += calls * (1 + accumulation * (again and key[0] == "forward"))
        for key, calls in first.items():
            total[key] += calls * (accumulation - 1)
        return total

    def _costs_of_chunks(self) -> tuple[Costs, Costs]:
        first: Costs = Counter()
        last: Costs = Counter()
        for phase in self.phases:
            last.update(phase.costs)
            if phase.name == "end" and phase is not self.phases[-1]:
                first, last = last, Counter()
        return first, last

    def blocks(self, tower: str) -> int:
        """How many the tower has."""
        return len({phase.name for phase in self.phases if phase.name.startswith(f"{tower}.block.")})


@dataclass(frozen=True)
class Moment:
    """What is there at one time, by kind; `phase` says when."""

    phase: str
    bytes: Bytes

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def read(recording: Recording) -> Steps:
    """The phases of a recording. What a forward pass makes and leaves behind is an activation, by what made it."""
    kinds = _kinds(recording)
    marks = recording.marks
    start = _sums(kinds, recording.changes[: marks[0][1]])
    phases = []
    last = ("", len(recording.changes), len(recording.costs))
    for (name, first, first_cost), (_, end, end_cost) in zip(marks, [*marks[1:], last], strict=True):
        kept, peak = _course(kinds, recording.changes[first:end])
        phases.append(Phase(name, kept, peak, _counted(name, recording.costs[first_cost:end_cost])))
    return Steps(start, tuple(phases))


def highest(recording: Recording) -> Bytes:
    """What there is at the moment when there is most, by what made it."""
    return _course(recording.makers, recording.changes)[1]


def deepen(steps: Steps, wanted: Mapping[str, int], more: Bytes) -> Steps:
    """The step of a model with more blocks.

    Each tower's middle block stands for those that are missing.

    Args:
        wanted: blocks of each tower.
        more: what there is from the start besides, by kind.
    """
    more_blocks = {tower: blocks - steps.blocks(tower) for tower, blocks in wanted.items()}
    middles = {tower: steps.blocks(tower) // 2 for tower in wanted}
    phases: list[Phase] = []
    for phase in steps.phases:
        tower, kind, number = (*phase.name.lstrip("~").split("."), "", "")[:3]
        if kind != "block":
            phases.append(phase)
            continue
        extra, index = more_blocks[tower], int(number)
        numbers = (
            range(index, index + extra + 1) if index == middles[tower] else [index + extra * (index > middles[tower])]
        )
        prefix = phase.name.removesuffix(number)
        phases += [replace(phase, name=f"{prefix}{n}") for n in (reversed(numbers) if phase.is_backward else numbers)]
    deep = Steps(_without_empty(steps.start + more), tuple(phases))
    # What is let go all at once when autocast ends, the few blocks show for themselves alone.
    uncast = 0
    for tower, extra in more_blocks.items():
        names = (f"{tower}.block.{middles[tower]}", f"~{tower}.block.{middles[tower]}")
        uncast += extra * sum(phase.kept[CASTS] for phase in steps.phases if phase.name in names)
    chunks = sum(phase.name == UNCAST for phase in steps.phases)
    return insert(deep, UNCAST, kept=Counter({CASTS: -uncast // chunks})) if uncast else deep


def course(steps: Steps) -> list[Moment]:
    """The highest moment of each phase."""
    live = Counter(steps.start)
    moments = []
    for phase in steps.phases:
        moments.append(Moment(phase.name, _added(live, phase.peak)))
        live = _added(live, phase.kept)
    return moments


def insert(steps: Steps, name: str, *, kept: Bytes | None = None, peak: Bytes | None = None) -> Steps:
    """The step with something more in the phase `name`."""
    phases = [
        replace(phase, kept=_added(phase.kept, kept or Counter()), peak=_added(phase.peak, peak or Counter()))
        if phase.name == name
        else phase
        for phase in steps.phases
    ]
    return Steps(steps.start, tuple(phases))


def _kinds(recording: Recording) -> list[str]:
    kinds = []
    born, died = _phases_of_storages(recording)
    names = [name for name, _, _ in recording.marks]
    for storage, maker in enumerate(recording.makers):
        at = born.get(storage, -1)
        lives_on = died.get(storage, len(names)) != at
        if maker in _STAYS or at < 0:
            kinds.append(maker)
        elif names[at].startswith(("~", "loss", "end")) or not lives_on:
            kinds.append(WORKING)
        else:
            kinds.append(maker if maker == CASTS else f"activations: {maker}")
    return kinds


def _phases_of_storages(recording: Recording) -> tuple[dict[int, int], dict[int, int]]:
    """In which phase each storage is made, and in which it goes; -1 before the first, nothing for never."""
    born: dict[int, int] = {}
    died: dict[int, int] = {}
    bounds = [first for _, first, _ in recording.marks]
    phase = -1
    sizes: dict[int, int] = defaultdict(int)
    for place, (storage, change) in enumerate(recording.changes):
        while phase + 1 < len(bounds) and place >= bounds[phase + 1]:
            phase += 1
        born.setdefault(storage, phase)
        sizes[storage] += change
        if sizes[storage] == 0:
            died[storage] = phase
    return born, died


def _course(kinds: Sequence[str], changes: Sequence[tuple[int, int]]) -> tuple[Bytes, Bytes]:
    total = highest = place = 0
    for index, (_, change) in enumerate(changes):
        total += change
        if total > highest:
            highest, place = total, index + 1
    return _sums(kinds, changes), _sums(kinds, changes[:place])


def _sums(kinds: Sequence[str], changes: Sequence[tuple[int, int]]) -> Bytes:
    sums: Bytes = Counter()
    for storage, change in changes:
        sums[kinds[storage]] += change
    return _without_empty(sums)


def _added(one: Bytes, other: Bytes) -> Bytes:
    """Unlike `+` of counters this keeps what is negative."""
    return Counter({kind: one[kind] + other[kind] for kind in {**one, **other}})


def _without_empty(sums: Bytes) -> Bytes:
    return Counter({kind: size for kind, size in sums.items() if size})


def _counted(name: str, costs: Sequence[Cost]) -> Costs:
    stage = "backward" if name.startswith("~") else TEACHER if name == TEACHER else "forward"
    return Counter(("recomputation" if cost.again else stage, cost) for cost in costs if cost.term)
