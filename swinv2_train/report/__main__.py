"""``python -m swinv2_train.report RUN_DIR [RUN_DIR ...] [out=FILE]``: a run's page anew, or several runs on one."""

from __future__ import annotations

import sys
from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import stoppable
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.report.comparison import write_comparison
from swinv2_train.report.page import write_report

USAGE = """swinv2-report RUN_DIR                            write RUN_DIR/report.html anew, as the run stands now
swinv2-report RUN_DIR RUN_DIR ... [out=FILE]     compare runs on one page (comparison.html): what differs between
                                                 their configurations, scores, states, curves together
"""
DEFAULT_OUT = "comparison.html"


def report(arguments: list[str]) -> int:
    """Write the page that the arguments ask for; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return EXIT_DONE
    outs = [each.removeprefix("out=") for each in arguments if each.startswith("out=")]
    runs = [Path(each.removeprefix("run_dir=")) for each in arguments if not each.startswith("out=")]
    unknown = [str(run) for run in runs if str(run).startswith("-")]
    if unknown or not runs or len(outs) > 1 or "" in outs:
        raise ConfigError(f"name directories of runs and at most one out=FILE\n{USAGE.rstrip()}")
    missing = [str(run) for run in runs if not run.is_dir()]
    if missing:
        raise ConfigError(f"{missing[0]} is no directory; name directories of runs")
    if len(runs) == 1 and not outs:
        print(f"report: {write_report(runs[0])}")
    else:
        print(f"comparison: {write_comparison(runs, Path(outs[0] if outs else DEFAULT_OUT))}")
    return EXIT_DONE


def main() -> None:
    """The console script swinv2-report."""
    sys.exit(stoppable(lambda: report(sys.argv[1:])))


if __name__ == "__main__":
    main()
