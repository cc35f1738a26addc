"""The flags of `plan.py --devices=N`, and its call into the package."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

DEVICES = flags.DEFINE_integer("devices", 0, "plan for so many devices, none of which is here", 0, 1024)
PEAK_TFLOPS = flags.DEFINE_float("peak_tflops", 312.0, "with it: peak of a device, in 10^12 FLOP/s (A100: 312)", 1e-3)
PEAK_SHARE = flags.DEFINE_float("peak_share", 0.4, "with it: share of that which products reach", 1e-3, 1.0)
BANDWIDTH = flags.DEFINE_float("bandwidth", 25.0, "with it: 10^9 bytes/s that a device sends (200 Gbit/s: 25)", 1e-3)
NOT_WITH_IT = ("mac", "measure", "table")


def tell_device_plan(config: Any, budget: int, workdir: Path | None, as_json: bool) -> None:
    """Prints the plan of a config on `--devices`. Raises ValueError, in one line, for flags that do not go with it."""
    from tale_jax.planning.devices import Assumptions, plan_devices, print_device_plan
    from tale_jax.utils.files import json_line

    if wrong := [name for name in NOT_WITH_IT if flags.FLAGS[name].value]:
        raise ValueError(f"--devices={DEVICES.value} plans for devices that are not here; leave --{wrong[0]} out")
    assumptions = Assumptions(PEAK_TFLOPS.value, PEAK_SHARE.value, BANDWIDTH.value)
    plan = plan_devices(config, DEVICES.value, assumptions, budget, workdir)
    if as_json:
        print(json_line(dataclasses.asdict(plan)))
    else:
        print_device_plan(plan)
