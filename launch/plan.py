"""Says before any step whether a run fits, how long it takes, and what would make it fit.

python launch/plan.py --config=configs/m2_air.py --memory=8GB
python launch/plan.py --config=configs/m2_air.py --memory=8GB --mac
python launch/plan.py --config=configs/tales.py --json
python launch/plan.py --config=configs/gpt2.py --devices=8 --config.mesh.fsdp=8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
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
DEVICES = flags.DEFINE_integer("devices", 0, "plan for so many devices, none of which is here", 0, 1024)
PEAK_TFLOPS = flags.DEFINE_float("peak_tflops", 312.0, "with it: peak of a device, in 10^12 FLOP/s (A100: 312)", 1e-3)
PEAK_SHARE = flags.DEFINE_float("peak_share", 0.4, "with it: share of that which products reach", 1e-3, 1.0)
BANDWIDTH = flags.DEFINE_float("bandwidth", 25.0, "with it: 10^9 bytes/s that a device sends (200 Gbit/s: 25)", 1e-3)
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.convert.formats import with_base
    from tale_jax.planning import calibrate, devices
    from tale_jax.utils.format import parse_bytes

    config = with_base(Config.build(CONFIG.value, overrides("config")), WORKDIR.value, overrides("config"))
    place = WORKDIR.value, parse_bytes(MEMORY.value)
    if DEVICES.value:
        others = {"mac": MAC.value, "measure": MEASURE.value, "table": TABLE.value}
        assumptions = devices.Assumptions(PEAK_TFLOPS.value, PEAK_SHARE.value, BANDWIDTH.value)
        devices.tell_device_plan(config, DEVICES.value, assumptions, *place, others, JSON.value)
    elif TABLE.value:
        calibrate.tell_calibrations(config)
    else:
        calibrate.tell_plan(config, *place, MAC.value, TIME.value, MEASURE.value, JSON.value)


if __name__ == "__main__":
    run(main)
