"""Reports what this machine can do, what does not work on it, and what to do next.

python launch/doctor.py
python launch/doctor.py --json
"""

import json
from pathlib import Path

from absl import flags
from cli import run

FOLDER = flags.DEFINE_string("folder", ".", "where experiments will be: the speed of its disk is measured")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.planning import doctor

    found = doctor.examine(Path(FOLDER.value))
    if JSON.value:
        print(json.dumps(found))
    else:
        doctor.print_findings(found)


if __name__ == "__main__":
    run(main)
