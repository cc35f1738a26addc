"""Holds every file of a workdir against its digests: exit code 0 when all hold, 1 when one does not.

python launch/verify.py --workdir=experiments/tales
python launch/verify.py --workdir=experiments/tales --json
python launch/verify.py --workdir=experiments/tales --repair

`--repair` moves damaged checkpoints aside, removes what a kill left half-written, and restores config.json.
"""

import json
import sys
from pathlib import Path

from absl import flags
from cli import run

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the experiment")
REPAIR = flags.DEFINE_bool("repair", False, "mend what can be mended, after saying what; then verify")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
    from tale_jax.runs.verify import repair, verify
    from tale_jax.utils.locks import writer_lock

    workdir = Path(WORKDIR.value)
    if REPAIR.value:
        with writer_lock(workdir, "verify --repair"):
            for line in repair(workdir):
                print(line, file=sys.stderr)
    found = verify(workdir)
    if JSON.value:
        print(json.dumps({"checked": found.checked, "bad": found.bad}))
    else:
        print(*found.bad, f"{found.checked} files checked, {len(found.bad)} faults", sep="\n")
    sys.exit(bool(found.bad))


if __name__ == "__main__":
    run(main)
