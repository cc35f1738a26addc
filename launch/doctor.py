"""Reports what this machine can do, what does not work on it, and what to do next.

python launch/doctor.py
python launch/doctor.py --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

FOLDER = define_path(
    "folder", "folder to write", "where experiments will be: the speed of its disk is measured", default="."
)
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.planning import doctor
    from tale_jax.utils.files import json_line

    found = doctor.examine(FOLDER.value)
    if JSON.value:
        print(json_line(found))
    else:
        doctor.print_findings(found)


if __name__ == "__main__":
    run(main)
