"""``python -m swinv2_train.monitoring.torchrun ARGUMENTS``: torchrun without its own report of ranks that have failed.

The ranks say themselves what went wrong.  torchrun adds thirty lines to that, and ends with 1 whatever they end with.
Where the nodes do not meet there are no ranks: then it is written down here, as an outage (outage.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.config.shown import shown
from swinv2_train.monitoring.outage import record_outage
from swinv2_train.runtime import RunDirLock

TRAIN = "swinv2_train.train"
_CANNOT_LISTEN = "failed to listen"
"""What torch says of a port of this host that another program has: the same command would not do better."""


def run_ranks(arguments: Sequence[str]) -> int:
    """torchrun in this process, with its own arguments; returns the exit code of the rank that ended first.

    128 + N where signal N ended it, or reached torchrun, which has passed it on and waited for the ranks then.  1 where
    the nodes did not meet, and then status.json of the run that they were to train says that it was an outage.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun says so itself; train sets its threads anyway
    logging.disable(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="torchrun_") as logs:  # torchrun would leave one of its own behind
            run.main(["--log-dir", logs, *arguments])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return _code_of(error.failures)
    except (RendezvousError, dist.DistError, OSError) as error:
        what = f"torchrun cannot start the ranks: {shown((str(error) or type(error).__name__).splitlines()[0])}"
        if isinstance(error, RendezvousError | dist.DistError) and _CANNOT_LISTEN not in str(error):
            what += "; does it run on every node, and is there no firewall between?"
            _record_outage(arguments, what)
        print(f"error: {what}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        logging.disable(logging.NOTSET)
    return EXIT_DONE


def _record_outage(arguments: Sequence[str], reason: str) -> None:
    """In the run directory of the train command that torchrun was to start; nowhere for another one, or a wrong one."""
    launched = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    if launched.training_script != TRAIN:
        return
    nodes = run.parse_min_max_nnodes(launched.nnodes)[1]
    with contextlib.suppress(ConfigError, OSError):
        run_dir = Path(compose_overrides(launched.training_script_args).run_dir)
        with RunDirLock(run_dir) as lock:
            record_outage(run_dir, lock, reason, nodes * run.determine_local_world_size(launched.nproc_per_node))


def _code_of(failures: Mapping[int, ProcessFailure]) -> int:
    """As a shell gives it; what a signal has ended could say nothing itself."""
    own = {rank: each for rank, each in failures.items() if each.exitcode != -signal.SIGTERM}  # not those it has ended
    rank, failure = min((own or failures).items(), key=lambda each: each[1].timestamp)
    if failure.exitcode >= 0:
        return failure.exitcode
    number = -failure.exitcode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    print(f"error: rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
    return 128 + number


if __name__ == "__main__":
    sys.exit(guarded(lambda: run_ranks(sys.argv[1:])))
