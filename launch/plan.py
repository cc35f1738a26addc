"""Says before any step whether a run fits, how long it takes, and what would make it fit.

python launch/plan.py --config=configs/m2_air.py --memory=8GB
python launch/plan.py --config=configs/m2_air.py --memory=8GB --mac
python launch/plan.py --config=configs/tales.py --json
python launch/plan.py --config=configs/gpt2.py --devices=8 --config.mesh.fsdp=8
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
import device_plan
from cli import define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/m2_air.py:tuned")
WORKDIR = define_path("workdir", "folder", "folder with prepared text, from which the length of a pass is known")
MEMORY = flags.DEFINE_string("memory", "", "budget, as 8GB; empty: what this machine has")
MAC = flags.DEFINE_bool("mac", False, "plan for the GPU of a Mac with --memory (8GB), on whatever machine this is")
TIME = flags.DEFINE_bool("time", True, "time a few steps")
MEASURE = flags.DEFINE_bool("measure", False, "calibrate the run, and compare what it took with the plan")
TABLE = flags.DEFINE_bool("table", False, "calibrate twelve runs around this one, and compare each with its plan")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("config")
flags.adopt_module_key_flags(device_plan)


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.convert.formats import with_base
    from tale_jax.hardware.backend import start_backend
    from tale_jax.planning import calibrate, plan
    from tale_jax.utils.files import json_line
    from tale_jax.utils.format import parse_bytes

    config = with_base(Config.build(CONFIG.value, overrides("config")), WORKDIR.value, overrides("config"))
    memory = parse_bytes(MEMORY.value)
    if device_plan.DEVICES.value:
        return device_plan.tell_device_plan(config, memory, WORKDIR.value, JSON.value)
    backend = start_backend(config.backend.platform)
    if TABLE.value:
        return calibrate.tell_calibrations(config, backend.platform)
    given = config, backend, WORKDIR.value, memory
    made = plan.make_mac_plan(*given) if MAC.value else plan.make_plan(*given, TIME.value)
    result = dataclasses.asdict(made)
    if not JSON.value:
        plan.print_plan(made)
    if MEASURE.value:
        result |= calibrate.tell_calibration(config, backend.platform)
    if JSON.value:
        print(json_line(result))


if __name__ == "__main__":
    run(main)
