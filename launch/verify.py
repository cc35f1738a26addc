"""Holds every file of a workdir against its digests: exit code 0 when all hold, 1 when one does not.

python launch/verify.py --workdir=experiments/tales
python launch/verify.py --workdir=experiments/tales --json
python launch/verify.py --workdir=experiments/tales --repair

`--repair` moves damaged checkpoints aside, removes what a kill left half-written, and restores config.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

WORKDIR = define_path("workdir", "folder", "folder of the experiment", required=True)
REPAIR = flags.DEFINE_bool("repair", False, "mend what can be mended, after saying what; then verify")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.runs.verify import repair, verify
    from tale_jax.utils.files import json_line
    from tale_jax.utils.streams import printable, say, write_line

    for line in repair(WORKDIR.value) if REPAIR.value else ():
        write_line(printable(line))
    found = verify(WORKDIR.value)
    if JSON.value:
        print(json_line({"checked": found.checked, "bad": found.bad}))
    else:
        say("\n".join([*found.bad, f"{found.checked} files checked, {len(found.bad)} faults"]))
    sys.exit(bool(found.bad))


if __name__ == "__main__":
    run(main)
