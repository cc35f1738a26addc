"""What this machine can do, what is broken on it, and what to do next.

Everything that needs JAX happens in another process, so that a plugin that does not start, or aborts the process, is
reported like anything else.

    python launch/doctor.py
    python -m tale_jax.planning.doctor cpu       # the other process: prints one JSON object as its last line
"""

import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from tale_jax.hardware import machine
from tale_jax.utils.format import format_bytes
from tale_jax.utils.subprocesses import run_module

TIMEOUT = 900  # seconds


def examine(folder: Path) -> dict[str, Any]:
    """Everything that doctor.py shows, as JSON. `folder`: where experiments will be written."""
    plugins = {name: machine.version(name) for name in machine.METAL_PLUGINS if machine.version(name)}
    problems, advice = [], []
    try:
        plugin = machine.metal_plugin()
    except ValueError as error:
        plugin = ""
        problems.append(str(error))
    if plugin and (reason := machine.start_failure(plugin)):
        problems.append(f"{plugin} {plugins[plugin]} does not start: {reason}")
        advice.append(
            f"pip uninstall {plugin} to train on the CPU; for the GPU make the environment again with the pinned "
            f"versions: make env EXTRAS=dev,{'metal' if plugin == 'jax-mps' else plugin}"
        )
    if machine.is_apple_silicon() and not plugins:
        advice.append(f"the GPU is not used: {machine.no_plugin_reason()}")
    computes = _measure_in_subprocess("auto")
    if "error" in computes and plugins:
        problems.append(f"JAX does not start with platform auto: {computes['error']}")
        computes = _measure_in_subprocess("cpu")
    if "error" in computes:
        problems.append(f"JAX does not start on the CPU either: {computes['error']}")
        advice.append("make the environment again: make clean, then make env")
    usage = shutil.disk_usage(folder)
    return {
        "machine": {
            "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()} on {platform.machine()}",
            "cpu": machine.cpu_name(),
            "memory_bytes": machine.total_memory(),
            "gpu_working_set_bytes": machine.gpu_working_set(plugin),
            "disk_free_bytes": usage.free,
            "disk_write_bytes_per_second": machine.disk_speed(folder),
            "python": platform.python_version(),
        },
        "versions": {name: machine.version(name) for name in machine.LIBRARIES},
        "plugins": plugins,
        "computes": computes,
        "problems": problems,
        "advice": advice + _advice(computes),
    }


def _measure_in_subprocess(name: str) -> dict[str, Any]:
    """The result of `measure_platform` in a process of its own, or {"error": one line}."""
    result = run_module("tale_jax.planning.doctor", name, timeout=TIMEOUT)
    return {"error": result.reason} if result.reason else result.json()


def measure_platform(name: str) -> dict[str, Any]:
    """Starts JAX on a platform in this process: which it is, how fast, and the check of each dtype."""
    from tale_jax.hardware.backend import matmul_peak, memory_bandwidth, start_backend
    from tale_jax.planning.numerics import check_dtypes, choose_precision

    backend = start_backend(name)
    checks = check_dtypes(backend)
    try:
        chosen, reason = choose_precision(backend, "auto")
    except ValueError as error:
        chosen, reason = "", str(error)
    return {
        "platform": backend.platform,
        "plugin": backend.plugin,
        "device": backend.device,
        "num_devices": len(backend.devices),
        "memory_bytes": backend.memory,
        "note": backend.note,
        "precision": str(chosen),
        "precision_reason": reason,
        "dtypes": [dataclasses.asdict(check) for check in checks],
        "matmul_flops": {check.dtype: matmul_peak(check.dtype) for check in checks if check.correct},
        "memory_bytes_per_second": memory_bandwidth(),
    }


def _advice(computes: Mapping[str, Any]) -> list[str]:
    if "error" in computes:
        return []
    chosen, memory = computes["precision"], computes["memory_bytes"]
    advice = (
        [f"precision=auto will take {chosen} on {computes['platform']}"] if chosen else [computes["precision_reason"]]
    )
    if computes["note"]:
        advice.insert(0, computes["note"])
    if memory and memory < 10e9:
        advice.append("little memory: start from configs/m2_air.py, which recomputes its blocks and scans its layers")
    return [*advice, "whether a run fits and how long it takes: python launch/plan.py --config=configs/tales.py"]


def print_findings(found: Mapping[str, Any]) -> None:
    """Prints what `examine` found, as tables."""
    console = rich.console.Console(highlight=False)
    facts, computes = found["machine"], found["computes"]
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title="Machine", title_justify="left")
    free, disk_speed = format_bytes(facts["disk_free_bytes"]), facts["disk_write_bytes_per_second"] / 1e6
    rows = {
        "system": facts["system"],
        "cpu": facts["cpu"],
        "memory": format_bytes(facts["memory_bytes"]),
        "disk": f"{free} free, {disk_speed:,.0f} MB/s",
        "python": facts["python"],
        "libraries": ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        "Metal plugin": ", ".join(f"{name} {version}" for name, version in found["plugins"].items()) or "none",
    }
    if "error" not in computes:
        rows |= {
            "platform": f"{computes['platform']}: {computes['device']}",
            "memory for a run": format_bytes(computes["memory_bytes"]) if computes["memory_bytes"] else "unknown",
            "memory speed": f"{computes['memory_bytes_per_second'] / 1e9:,.1f} GB/s",
        }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if "error" not in computes:
        table = rich.table.Table(
            box=rich.box.SIMPLE, title="Precision, against float32 on the CPU", title_justify="left"
        )
        for title in ("dtype", "correct", "loss", "gradients", "updates", "decoding", "training", "matmul"):
            table.add_column(title, justify="left" if title in ("dtype", "correct") else "right")
        for check in computes["dtypes"]:
            errors = [check[f"{name}_error"] for name in ("loss", "gradient", "update", "decode")]
            rate = computes["matmul_flops"].get(check["dtype"])
            table.add_row(
                check["dtype"],
                "yes" if check["correct"] else f"no: {check['reason']}",
                *("-" if error is None else f"{error:.0e}" for error in errors),
                f"{check['tokens_per_second']:,.0f} tokens/s",
                f"{rate / 1e9:,.0f} GFLOP/s" if rate else "-",
            )
        console.print(table)
    for title, lines in (("Problems", found["problems"]), ("What to do next", found["advice"])):
        if lines:
            console.print(title)
            for line in lines:
                console.print(f"  - {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    try:
        print(json.dumps(measure_platform(sys.argv[1])))
    except ValueError as error:
        sys.exit(str(error))
