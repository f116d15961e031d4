"""torchrun with its workers, forked from a process that has imported torch: each would take seconds to do so.

`test_elastic.py` has the command itself, whose workers are programs.
"""

import os
from multiprocessing import get_context

from processes import PRELOADED
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.multiprocessing.spawn import ProcessContext


def start_torchrun(options, work, arguments, environment, told):
    """`torchrun` with these options, whose workers call `work(*arguments)`; what all of them print goes to `told`."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "torch.distributed.run"])
    process = context.Process(target=_run, args=(options, work, arguments, environment, told))
    process.start()
    return process


@record
def _run(options, work, arguments, environment, told):
    os.environ |= environment
    with told.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    config, _, _ = config_from_args(parse_args([*options, "program"]))
    config.start_method = "fork"
    if "SHUTDOWN" in environment:
        # From one worker's end to the kill of the others: 30 s, whatever --shutdown-timeout says.
        wait, seconds = ProcessContext._join_procs_with_timeout, float(environment["SHUTDOWN"])
        ProcessContext._join_procs_with_timeout = lambda self, _: wait(self, seconds)  # type: ignore[method-assign]
    elastic_launch(config, work)(*arguments)
