"""What this machine can do, what is broken on it, and what to do next.

Everything that needs JAX happens in another process: a plugin that does not start, or takes the process with it, is
something to report and not to die of.

    python launch/doctor.py
    python -m tale_jax.doctor cpu       # what that other process prints: one JSON object as its last line
"""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from tale_jax import machine
from tale_jax.machine import format_bytes

TIMEOUT = 900  # seconds


def examine(folder: Path) -> dict[str, Any]:
    """Everything that doctor.py tells, as JSON has it. `folder`: where experiments will lie."""
    plugins = {name: machine.version(name) for name in machine.METAL_PLUGINS if machine.version(name)}
    problems, advice = [], []
    try:
        plugin = machine.metal_plugin()
    except ValueError as error:
        plugin = ""
        problems.append(str(error))
    if plugin and (reason := machine.trial(plugin)):
        problems.append(f"{plugin} {plugins[plugin]} does not start: {reason}")
        advice.append(
            f"pip uninstall {plugin} to train on the CPU; for the GPU make the environment again with the pinned "
            f"versions: make env EXTRAS=dev,{'metal' if plugin == 'jax-mps' else plugin}"
        )
    if machine.is_apple_silicon() and not plugins:
        advice.append(f"the GPU is not used: {machine.why_no_metal()}")
    computes = _elsewhere("auto")
    if "error" in computes and plugins:
        problems.append(f"JAX does not start with platform auto: {computes['error']}")
        computes = _elsewhere("cpu")
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


def _elsewhere(name: str) -> dict[str, Any]:
    """What `measure` finds in a process of its own, or {"error": one line}."""
    try:
        command = [sys.executable, "-m", "tale_jax.doctor", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    said = " ".join((done.stderr.strip().splitlines() or ["it said nothing"])[-1].split())[:300]
    return {"error": f"signal {-done.returncode}: {said}" if done.returncode < 0 else said}


def measure(name: str) -> dict[str, Any]:
    """Starts JAX in this process and measures: platform, rates, and the probe of each dtype."""
    from tale_jax import backend, probe

    here = backend.start(name)
    findings = probe.probe(here)
    right = [finding for finding in findings if finding.correct]
    try:
        chosen, why = probe.choose_precision(here, "auto")
    except ValueError as error:
        chosen, why = "", str(error)
    return {
        "platform": here.platform,
        "plugin": here.plugin,
        "device": here.device,
        "num_devices": len(here.devices),
        "memory_bytes": here.memory,
        "note": here.note,
        "precision": str(chosen),
        "precision_reason": why,
        "probe": [dataclasses.asdict(finding) for finding in findings],
        "matmul_flops": {finding.dtype: backend.matmul_peak(finding.dtype) for finding in right},
        "memory_bytes_per_second": backend.memory_rate(),
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


def show(found: Mapping[str, Any]) -> None:
    """Prints what `examine` found, as tables for people."""
    console = rich.console.Console(highlight=False)
    m, computes = found["machine"], found["computes"]
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title="Machine", title_justify="left")
    rows = {
        "system": m["system"],
        "cpu": m["cpu"],
        "memory": format_bytes(m["memory_bytes"]),
        "disk": f"{format_bytes(m['disk_free_bytes'])} free, {m['disk_write_bytes_per_second'] / 1e6:,.0f} MB/s",
        "python": m["python"],
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
        for title in ("dtype", "right", "loss", "gradients", "decoding", "training", "matmul"):
            table.add_column(title, justify="left" if title in ("dtype", "right") else "right")
        for finding in computes["probe"]:
            errors = [finding[f"{name}_error"] for name in ("loss", "gradient", "decode")]
            rate = computes["matmul_flops"].get(finding["dtype"])
            table.add_row(
                finding["dtype"],
                "yes" if finding["correct"] else f"no: {finding['reason']}",
                *("-" if error is None else f"{error:.0e}" for error in errors),
                f"{finding['tokens_per_second']:,.0f} tokens/s",
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
        print(json.dumps(measure(sys.argv[1])))
    except ValueError as error:
        sys.exit(str(error))
