"""Writes one HTML file about an experiment, or compares several: curves, samples, evaluations, config.

    python launch/report.py --workdir=experiments/tales
    python launch/report.py --workdir=experiments/a --workdir=experiments/b --out=a_and_b.html

The file needs no network. A run that is still going on can be reported, too.
"""

from pathlib import Path

from absl import flags
from cli import run

from tale_jax.runs.report import write_report

WORKDIR = flags.DEFINE_multi_string("workdir", None, "an experiment's folder; several are compared", required=True)
OUT = flags.DEFINE_string("out", "", "the file to write; report.html in the workdir (comparison.html beside) if empty")


def main(argv: list[str]) -> None:
    del argv
    path = write_report([Path(folder) for folder in WORKDIR.value], Path(OUT.value) if OUT.value else None)
    print(f"The report is {path}")


if __name__ == "__main__":
    run(main)
