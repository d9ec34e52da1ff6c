"""Command line: `python -m benchmarks run`, `report` and `tune`."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time every contender on this machine's GPU, after checking its result")
    run.add_argument("--out", type=Path, help="a JSON file; by default in benchmarks/results, named by GPU and date")
    commands.add_parser("report", help="write committed results into the README, the pages and the plots")
    tune = commands.add_parser("tune", help="search for a faster row of ce_kernels/tuning.py")
    tune.add_argument("kernel", choices=("fused", "stats", "grad"))
    tune.add_argument("n_rows", type=int)
    tune.add_argument("n_classes", type=int)
    tune.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    tune.add_argument("--soft-targets", action="store_true", help="probabilities instead of class indices")
    tune.add_argument("--label-smoothing", type=float, default=0.0)
    tune.add_argument("--in-place", action="store_true", help="the gradient overwrites the logits")
    tune.add_argument("--chosen", action="store_true", help="time only what the table has")
    arguments = parser.parse_args()
    # Each command imports what it needs: only `run` and `tune` need a GPU.
    if arguments.command == "report":
        from benchmarks.report import report

        report()
    elif arguments.command == "run":
        from benchmarks.run import run as run_benchmarks

        run_benchmarks(arguments.out)
    else:
        from benchmarks.tune import Task
        from benchmarks.tune import tune as search

        task = Task(**{name: getattr(arguments, name) for name in Task._fields})
        for timed in search(task, [None] if arguments.chosen else None)[:10]:
            print(f"{timed.ratio:.3f} × copy  {timed.config}")


if __name__ == "__main__":
    main()
