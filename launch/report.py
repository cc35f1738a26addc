"""Writes one HTML file about an experiment, or one that compares several: curves, samples, evaluations, config.

    python launch/report.py --workdir=experiments/tales
    python launch/report.py --workdir=experiments/a --workdir=experiments/b --out=a_and_b.html

The file needs no network. A run that is still training can be reported, too.
"""

from pathlib import Path

from absl import flags
from cli import run

from tale_jax.runs.report import write_report

WORKDIR = flags.DEFINE_multi_string("workdir", None, "folder of an experiment; several are compared", required=True)
OUT = flags.DEFINE_string(
    "out", "", "file to write; empty: report.html in the workdir, or comparison.html beside the first"
)


def main(argv: list[str]) -> None:
    del argv
    path = write_report([Path(folder) for folder in WORKDIR.value], Path(OUT.value) if OUT.value else None)
    print(f"The report is {path}")


if __name__ == "__main__":
    run(main)
