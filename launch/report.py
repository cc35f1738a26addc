"""Writes one HTML file about an experiment, or one that compares several: curves, samples, evaluations, config.

    python launch/report.py --workdir=experiments/tales
    python launch/report.py --workdir=experiments/a --workdir=experiments/b --out=a_and_b.html

The file needs no network. A run that is still training can be reported, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run

WORKDIR = define_path("workdir", "folder", "folder of an experiment; several are compared", required=True, several=True)
OUT = define_path("out", "file to write", "the report; else report.html in the workdir, or comparison.html beside it")


def main(_: list[str]) -> None:
    from tale_jax.runs.report import write_report
    from tale_jax.utils.streams import say

    say(f"The report is {write_report(WORKDIR.value, OUT.value)}")


if __name__ == "__main__":
    run(main)
