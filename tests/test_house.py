"""Holds what the layout promises: folders import one way, a library stays in its room, launch scripts stay short."""

import ast
import fnmatch
import io
import re
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Iterator

import pytest
from helpers import ROOT

# From the ground up: a folder imports only from those before it.
ORDER = (
    "tale_jax.utils",
    "tale_jax.config",
    "tale_jax.data",
    "tale_jax.model",
    "tale_jax.hardware",
    "tale_jax.inference",
    "tale_jax.evaluation",
    "tale_jax.training",
    "tale_jax.planning",
    "tale_jax.runs",
    "tale_jax.convert",
    "tale_jax.serve",
    "tale_jax.bench",
    "configs",
    "launch",
)
# Libraries, and the files of the package, the configs and the scripts that may import them.
ROOMS = {
    "absl": ("launch/*",),
    "ml_collections": ("configs/*", "launch/*", "tale_jax/config.py"),
    "orbax": ("tale_jax/training/checkpoint.py", "tale_jax/bench/saving.py"),
    "grain": ("tale_jax/data/loader.py", "tale_jax/training/checkpoint.py"),
    "matplotlib": ("tale_jax/runs/plots.py", "tale_jax/runs/report.py"),
    "datasets": ("tale_jax/data/readers.py",),
    "pyarrow": ("tale_jax/data/readers.py", "tale_jax/data/text_files.py"),
    "datasketch": ("tale_jax/data/duplicates.py",),
    "wandb": ("tale_jax/training/metrics.py",),
    "tensorboardX": ("tale_jax/training/metrics.py",),
    "gguf": ("tale_jax/convert/gguf.py",),
    "safetensors": ("tale_jax/convert/safetensors_files.py",),
    "tokenizers": ("tale_jax/convert/tokenizer_json.py", "tale_jax/data/json_tokenizer.py"),
    "transformers": (),
    "subprocess": ("tale_jax/utils/subprocesses.py", "tale_jax/bench/compare.py", "launch/cluster/ray_train.py"),
    "ray": ("launch/cluster/ray_train.py", "tale_jax/runs/engines/ray_tune.py"),
    "starlette": ("tale_jax/serve/server.py",),
    "uvicorn": ("tale_jax/serve/server.py",),
    "jinja2": ("tale_jax/data/template_worker.py",),
    "torch": (),
    "tensorflow": (),
}
MAX_LAUNCH_LINES = 40
MAX_LOOSE_MODULES = 4
MAX_TRAINING_LINES = 1800

SOURCES = sorted(path for folder in ("tale_jax", "configs", "launch") for path in (ROOT / folder).rglob("*.py"))


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def folder_of(module: str) -> str:
    """The room of a module: its folder, or itself where it stands loose in the package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tale_jax" else parts[0]


def imports(path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, `from a import b` as `a.b` where that is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written in full"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def folder_graph() -> dict[str, dict[str, list[str]]]:
    """Folder → folders that its files import from → those imports, in words."""
    graph: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, path in MODULES.items():
        for imported in dict.fromkeys(imports(path)):
            ours = imported if imported in MODULES else f"launch.{imported}" if name.startswith("launch.") else ""
            if ours in MODULES and folder_of(ours) != folder_of(name):
                graph[folder_of(name)][folder_of(ours)].append(f"{name} imports {ours}")
    return graph


def test_folders_import_one_way():
    graph, place = folder_graph(), {folder: index for index, folder in enumerate(ORDER)}
    homeless = {folder for folder in {*graph, *(f for edges in graph.values() for f in edges)} if folder not in place}
    assert not homeless, f"say in ORDER where these stand: {homeless}"
    upwards = [
        edge for folder, edges in graph.items() for to in edges if place[to] >= place[folder] for edge in edges[to]
    ]
    assert not upwards, "against ORDER: " + "; ".join(upwards)


def test_the_graph_sees_an_arrow_upwards(monkeypatch, tmp_path):
    changed = tmp_path / "tale_jax" / "utils" / "format.py"
    changed.parent.mkdir(parents=True)
    changed.write_text("def late():\n    from tale_jax.runs.train import train\n")
    monkeypatch.setitem(MODULES, "tale_jax.utils.format", changed)
    assert "tale_jax.runs" in folder_graph()["tale_jax.utils"]


def test_few_modules_stand_loose_in_the_package():
    loose = [path.name for path in (ROOT / "tale_jax").glob("*.py")]
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def test_every_module_says_what_it_is():
    silent = [name for name, path in MODULES.items() if path.stat().st_size and not ast.get_docstring(tree_of(path))]
    assert not silent, silent


def tree_of(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_training_can_be_read_in_an_hour():
    """What someone reads to understand training: batches, model, loss, optimizer, step and loop."""
    names = "data/loader.py model/*.py training/*.py"
    files = [file for name in names.split() for file in (ROOT / "tale_jax").glob(name)]
    # What is told and saved of it; what only sampling, and only fine-tuning need.
    others = ("metrics.py", "checkpoint.py", "decoding.py", "adapters.py", "packed.py")
    files = [file for file in files if file.name not in others]
    count = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert count <= MAX_TRAINING_LINES, count


def test_libraries_stay_in_their_rooms():
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in SOURCES
        for imported in dict.fromkeys(imports(path))
        if (library := imported.partition(".")[0]) in ROOMS
        and not any(fnmatch.fnmatchcase(path.relative_to(ROOT).as_posix(), room) for room in ROOMS[library])
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


SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.py")}
SCRIPTS = {name: text for name, text in SCRIPTS.items() if "\nif __name__ == " in text}
# The same in every script: its folder is on the path, and the right Python is looked for before a library is imported.
PREAMBLE = (
    "sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`",
    "from cli import ",
)


def test_launch_scripts_are_short():
    shared = 3  # lines: `import sys`, `from pathlib import Path`, and the first of PREAMBLE
    counts = {name: code_lines(text) - shared for name, text in SCRIPTS.items()}
    long = {name: count for name, count in counts.items() if count > MAX_LAUNCH_LINES}
    assert counts and not long, f"over {MAX_LAUNCH_LINES} lines of code: {long}; move the work into the package"


def test_launch_scripts_look_for_the_right_python_first():
    for name, text in SCRIPTS.items():
        libraries = [
            place for library in ("absl", "ml_collections", "tale_jax") if (place := text.find(f"from {library}")) >= 0
        ]
        places = [text.find(f"\n{line}") for line in PREAMBLE]
        assert 0 < places[0] < places[1] < min([*libraries, len(text)]), f"{name} must begin with {PREAMBLE}"


def test_launch_scripts_can_be_read_by_an_old_python():
    """Which then says in one line what it lacks: see `launch/cli.py`."""
    for name, text in {**SCRIPTS, "cli.py": (ROOT / "launch" / "cli.py").read_text(encoding="utf-8")}.items():
        ast.parse(text, filename=name, feature_version=(3, 7))


def test_what_scripts_print_cannot_steer_a_terminal():
    """`print` is for JSON, which has no control characters; all else goes through `say`."""
    wrong = [
        f"{name} line {node.lineno}"
        for name, text in SCRIPTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not (node.args and isinstance(node.args[0], ast.Call) and "json" in ast.unparse(node.args[0].func))
    ]
    assert not wrong, wrong


def test_paths_of_flags_are_opened_in_one_place():
    """Flags that are paths are defined by `define_path`, which expands and checks them."""
    paths = {"workdir", "out", "output", "plot", "path", "file", "prompt_file", "folder", "dir"}
    wrong = [
        f"{name}: --{node.args[0].value}"
        for name, text in SCRIPTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value in paths
        and "DEFINE" in ast.unparse(node.func)
    ]
    assert not wrong, f"use cli.define_path for {wrong}"


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
