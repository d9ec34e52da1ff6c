"""Command line: `python -m benchmarks run [--out FILE]` and `python -m benchmarks report`."""

import argparse
from pathlib import Path

from benchmarks.report import RESULTS, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time every contender on this machine's GPU, after checking its result")
    run.add_argument("--out", type=Path, default=RESULTS)
    commands.add_parser("report", help="write the results' tables into the README")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
    else:
        from benchmarks.run import run as run_benchmarks

        run_benchmarks(arguments.out)


if __name__ == "__main__":
    main()
