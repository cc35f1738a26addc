"""Metal plugins that are broken on purpose, and a Python process that finds them installed."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

from tale_jax.hardware import machine

RAISES = "def initialize():\n    raise RuntimeError('no Metal device found')\n"
ABORTS = "import os\n\n\ndef initialize():\n    os.abort()\n"


def install(folder: Path, name: str, source: str, version: str = "0.11.1") -> None:
    """Makes a distribution in `folder` whose JAX plugin does what `source` says."""
    module = f"fake_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[jax_plugins]\n{machine.METAL_PLUGINS[name].platform} = {module}\n")


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with what is installed in `folder`, which also holds its cache, and without settings of the tests."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
