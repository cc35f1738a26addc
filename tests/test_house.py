"""Holds what the layout promises: imports point one way, a library stays in its room, launch scripts stay short."""

import ast
import fnmatch
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import only from the rows below its own. The first pattern that fits decides.
LAYERS = (
    ("launch.*",),
    ("configs.*",),
    ("tale_jax.bench.show",),
    ("tale_jax.training.loop", "tale_jax.bench.processes", "tale_jax.bench.profile"),
    ("tale_jax.bench.measure", "tale_jax.budget"),
    ("tale_jax.doctor", "tale_jax.rehearse"),
    ("tale_jax.plan",),
    ("tale_jax.audit", "tale_jax.probe", "tale_jax.memory"),
    ("tale_jax.evaluate", "tale_jax.report", "tale_jax.convert.*"),
    ("tale_jax.writing",),
    ("tale_jax.sample", "tale_jax.plots", "tale_jax.quality"),
    ("tale_jax.runs",),
    ("tale_jax.training.step", "tale_jax.data", "tale_jax.checkpoint", "tale_jax.metrics"),
    ("tale_jax.training.state", "tale_jax.training.loss", "tale_jax.training.optimizer"),
    ("tale_jax.model.lora", "tale_jax.sharding"),
    ("tale_jax.training.schedule", "tale_jax.training.average", "tale_jax.training.scaling"),
    ("tale_jax.model.transformer",),
    ("tale_jax.model.head",),
    ("tale_jax.model.*",),
    ("tale_jax.text.prepare",),
    ("tale_jax.text.corpus", "tale_jax.text.windows", "tale_jax.text.encode"),
    ("tale_jax.text.tokenizer", "tale_jax.text.tales", "tale_jax.text.readers", "tale_jax.text.ngram"),
    ("tale_jax.text.tales_words",),
    ("tale_jax.backend",),
    ("tale_jax.config", "tale_jax.machine", "tale_jax.progress"),
    ("tale_jax", "tale_jax.*.__init__"),
)
# Inside these folders modules may import one another; the configs call their base, the scripts their common frame.
ONE_ROOM = ("launch.", "configs.", "tale_jax.convert.")
# Devices and meshes are decided at the top; dtypes and specs travel down as arguments.
USED_ONLY_BY = {
    "tale_jax.backend": (
        "launch.*",
        "tale_jax.training.loop",
        "tale_jax.training.step",
        "tale_jax.audit",
        "tale_jax.bench.*",
        "tale_jax.budget",
        "tale_jax.doctor",
        "tale_jax.memory",
        "tale_jax.plan",
        "tale_jax.probe",
        "tale_jax.rehearse",
    ),
    "tale_jax.sharding": ("launch.*", "tale_jax.training.loop", "tale_jax.training.step"),
}
# Libraries, and the files of the package, the configs and the scripts that may import them.
ROOMS = {
    "absl": ("launch/*",),
    "ml_collections": ("configs/*", "launch/*", "tale_jax/config.py"),
    "orbax": ("tale_jax/checkpoint.py",),
    "grain": ("tale_jax/data.py", "tale_jax/checkpoint.py"),
    "matplotlib": ("tale_jax/plots.py", "tale_jax/report.py"),
    "datasets": ("tale_jax/text/*",),
    "pyarrow": ("tale_jax/text/*",),
    "wandb": ("tale_jax/metrics.py",),
    "tensorboardX": ("tale_jax/metrics.py",),
    "torch": (),
    "tensorflow": (),
}
MAX_LAUNCH_LINES = 40

SOURCES = sorted(path for folder in ("tale_jax", "configs", "launch") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, `from a import b` as `a.b` where that is a module of ours."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def own_imports(name: str) -> Iterator[str]:
    for imported in dict.fromkeys(imports(MODULES[name])):
        if name.startswith("launch.") and f"launch.{imported}" in MODULES:  # a script's own folder is on its path
            yield f"launch.{imported}"
        elif imported in MODULES:
            yield imported


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layer(name: str) -> int:
    """The row of a module, 0 at the top."""
    if MODULES[name].name == "__init__.py" and name != "tale_jax":
        name += ".__init__"
    return next((row for row, patterns in enumerate(LAYERS) if fits(name, patterns)), -1)


def test_every_module_has_a_layer():
    homeless = [name for name in MODULES if layer(name) < 0]
    assert not homeless, f"say in LAYERS where these stand: {homeless}"


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in own_imports(name)
        if layer(imported) <= layer(name) and not any(name.startswith(r) and imported.startswith(r) for r in ONE_ROOM)
    ]
    assert not wrong, "against the order of LAYERS: " + "; ".join(wrong)


def test_backend_and_sharding_are_used_at_the_top():
    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in own_imports(name)
        if imported in USED_ONLY_BY and not fits(name, USED_ONLY_BY[imported])
    ]
    assert not wrong, "pass what they decide as an argument: " + "; ".join(wrong)


def test_libraries_stay_in_their_rooms():
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in SOURCES
        for imported in dict.fromkeys(imports(path))
        if (library := imported.partition(".")[0]) in ROOMS
        and not fits(path.relative_to(ROOT).as_posix(), ROOMS[library])
    ]
    assert not wrong, "; ".join(wrong)


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, not a comment, not the module's docstring."""
    first = ast.parse(source).body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = (first.end_lineno or 0) if is_docstring else 0
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len([line for line in lines if line > start])


def test_launch_scripts_are_short():
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.py")}
    counts = {name: code_lines(text) for name, text in scripts.items() if "\nif __name__ == " in text}
    long = {name: count for name, count in counts.items() if count > MAX_LAUNCH_LINES}
    assert counts and not long, f"over {MAX_LAUNCH_LINES} lines of code: {long}; move the work into the package"


# What names one machine or one download place. The patterns do not match their own text.
FORBIDDEN = {
    "a package registry": re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.(com|org)"),
    "a package file's address": re.compile(r"https?://\S+\.(whl|tar\.gz|zip|dmg)\b"),
    "a path of one machine": re.compile(r"(?<![\w.~])/(work|root|Users/\w+|home/\w+)/"),
}


def test_no_file_names_a_machine_or_a_registry():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout, so which files belong to it is unknown")
    wrong = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or removed but not yet committed
            continue
        wrong += [f"{name}: {kind}: {m.group()}" for kind, p in FORBIDDEN.items() for m in p.finditer(text)]
    assert not wrong, "; ".join(wrong)
