"""What a GPU proves in ten minutes: `python -m benchmarks.gpu_check`, in stages, on the torch that is there, offline.

Each stage is a module of `stages/`:

    SECONDS = 60                                       # its share of a budget of 540; 0: only with --only NAME

    def units(settings: Settings) -> list[Unit]        # what there is to do, in pieces that may die alone
    def run(unit: Unit, session: Session) -> None      # does one of them, in a process of its own

`run` does its work in cases, `session.case(name, function)`: each is recorded as it begins and ends, so a call that is
cut off, or dies of a kernel, goes on behind it.
"""
