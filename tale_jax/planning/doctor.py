"""What this machine can do, what is broken on it, and what to do next.

Everything that needs JAX happens in another process, so that a plugin that does not start, or aborts the process, is
reported like anything else.

    python launch/doctor.py
    python -m tale_jax.planning.doctor cpu       # the other process: prints one JSON object as its last line
"""

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tale_jax.hardware import environment, machine
from tale_jax.utils.format import format_bytes
from tale_jax.utils.paths import fault_of, printable_path, quoted
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import printable, table_console
from tale_jax.utils.subprocesses import run_module

TIMEOUT = 900  # seconds
NUM_STAGES = 7  # the disk, starting JAX, three dtypes, products, memory
DOING = "doing: "  # begins a line of the other process that says what comes next


def examine(folder: Path) -> dict[str, Any]:
    """Everything that doctor.py shows, as JSON. `folder`: where experiments will be written."""
    plugins = {name: machine.version(name) for name in machine.METAL_PLUGINS if machine.version(name)}
    problems, advice = [], []
    with Progress("doctor", total=NUM_STAGES, unit="stages") as progress:
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
        with progress.stage("writing to the disk"):
            disk_speed, disk_free = _measure_disk(folder, problems)
        computes = _measure_in_subprocess("auto", progress)
        if "error" in computes and plugins:
            problems.append(f"JAX does not start with platform auto: {computes['error']}")
            computes = _measure_in_subprocess("cpu", progress)
        if "error" in computes:
            problems.append(f"JAX does not start on the CPU{' either' * bool(plugins)}: {computes['error']}")
            advice.append(_advice_on_start())
    problems += _problems_of_the_environment()
    return {
        "machine": {
            "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()} on {platform.machine()}",
            "cpu": machine.cpu_name(),
            "memory_bytes": machine.total_memory(),
            "gpu_working_set_bytes": machine.gpu_working_set(plugin),
            "disk_free_bytes": disk_free,
            "disk_write_bytes_per_second": disk_speed,
            "python": platform.python_version(),
            "python_path": sys.executable,
        },
        "environment": environment.changed_variables(),
        "versions": {name: machine.version(name) for name in machine.LIBRARIES},
        "plugins": plugins,
        "computes": computes,
        "problems": problems,
        "advice": advice + _advice(computes),
    }


def _measure_disk(folder: Path, problems: list[str]) -> tuple[float, int]:
    """Bytes a second that can be written, and free bytes; 0 and a problem where nothing can."""
    try:
        return machine.disk_speed(folder), shutil.disk_usage(folder).free
    except OSError as error:
        name = printable_path(folder.absolute())
        problems.append(f"{name} cannot be written to ({error.strerror or error}); give another --folder or --workdir")
        return 0.0, 0


def _problems_of_the_environment() -> Iterator[str]:
    """What slows a run down, or hides what it says, and is no reason to stop."""
    if fault := machine.cache_fault():
        yield f"compiled programs are not kept from one start to the next: {fault}; set XDG_CACHE_HOME to a folder"
    user_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if user_cache and not user_cache.startswith("gs://") and (fault := fault_of(Path(user_cache), "folder to write")):
        yield f"compiled programs are not kept: JAX_COMPILATION_CACHE_DIR={printable_path(user_cache)} {fault}"
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    if encoding and not encoding.replace("-", "").startswith("utf8"):
        yield f"text is shown in {encoding}, which lacks most characters; set LC_ALL=C.UTF-8 and unset PYTHONIOENCODING"


def _advice_on_start() -> str:
    """What to do where JAX does not start: variables of the environment are looked at first."""
    names = [name for name in environment.changed_variables() if name != "GLIBC_TUNABLES"]
    if names:
        unset = " ".join(f"-u {name}" for name in names)
        return f"try without what is set in the environment: env {unset} …; else make clean, then make env"
    return "make the environment again: make clean, then make env"


def _measure_in_subprocess(name: str, progress: Progress) -> dict[str, Any]:
    """The result of `measure_platform` in a process of its own, or {"error": one line}.

    What that process says it is doing is shown, and counted as a stage when the next thing begins.
    """
    with ExitStack() as stage:

        def show(line: str) -> None:
            if line.startswith(DOING):
                stage.close()
                stage.enter_context(progress.stage(line.removeprefix(DOING)))

        show(f"{DOING}starting JAX")
        result = run_module("tale_jax.planning.doctor", name, timeout=TIMEOUT, on_stderr=show)
    return {"error": result.reason} if result.reason else result.json()


def measure_platform(name: str) -> dict[str, Any]:
    """Starts JAX on a platform in this process: which it is, how fast, and the check of each dtype."""
    from tale_jax.hardware.backend import matmul_peak, memory_bandwidth, start_backend
    from tale_jax.planning.numerics import check_dtypes, choose_precision, time_of_kept_checks

    backend = start_backend(name)
    kept_time = time_of_kept_checks(backend)
    checks = check_dtypes(backend, tell=_tell)
    _tell("timing matrix products")
    try:
        chosen, reason = choose_precision(backend, "auto")
    except ValueError as error:
        chosen, reason = "", str(error)
    flops = {check.dtype: matmul_peak(check.dtype) for check in checks if check.correct}
    _tell("timing memory")
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
        "dtypes_checked_time": kept_time,
        "matmul_flops": flops,
        "memory_bytes_per_second": memory_bandwidth(),
    }


def _tell(what: str) -> None:
    print(f"{DOING}{what}", file=sys.stderr, flush=True)


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
    console = table_console()
    facts, computes = found["machine"], found["computes"]
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title="Machine", title_justify="left")
    free, disk_speed = format_bytes(facts["disk_free_bytes"]), facts["disk_write_bytes_per_second"] / 1e6
    rows = {
        "system": facts["system"],
        "cpu": facts["cpu"],
        "memory": format_bytes(facts["memory_bytes"]),
        "disk": f"{free} free, {disk_speed:,.0f} MB/s",
        "python": f"{facts['python']} ({printable(facts['python_path'])})",
        "environment": printable(", ".join(f"{name}={value}" for name, value in found["environment"].items())) or "-",
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
        if kept_time := computes["dtypes_checked_time"]:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept_time))
            rest = f"measured now; to check again: rm -r {quoted(machine.cache_file('dtypes') or '-')}"
            console.print(f"The columns correct to training were measured on {when} and kept; matmul was {rest}")
    for title, lines in (("Problems", found["problems"]), ("What to do next", found["advice"])):
        if lines:
            console.print(title)
            for line in lines:
                console.print(f"  - {printable(line)}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    try:
        print(json.dumps(measure_platform(sys.argv[1])))
    except ValueError as error:
        sys.exit(str(error))
