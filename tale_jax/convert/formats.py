"""The formats that a model goes out to, and comes in from: a name and a function each.

A new format is one function and one entry here. A function that writes takes the experiment, the path to make and the
dtype; one that reads takes what to read and the workdir to make. Either makes what is asked for whole, or not at all.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tale_jax.config import Config
from tale_jax.convert.gguf import export_gguf
from tale_jax.convert.huggingface import export_huggingface, import_huggingface, our_config, read_json
from tale_jax.convert.ollama import export_ollama
from tale_jax.convert.peft import export_peft
from tale_jax.data.prepare import BASE_FOLDER
from tale_jax.hardware.backend import start_backend
from tale_jax.runs.experiment import Experiment, open_experiment
from tale_jax.utils.paths import fault_of, printable_path

EXPORTS: dict[str, Callable[[Experiment, Path, str], None]] = {
    "huggingface": export_huggingface,
    "peft": export_peft,
    "gguf": export_gguf,
    "ollama": export_ollama,
}
IMPORTS: dict[str, Callable[[Path, Path], None]] = {"huggingface": import_huggingface}


def convert(
    workdir: Path,
    *,
    to: str = "",
    out: Path | None = None,
    dtype: str = "float32",
    step: int = 0,
    weights: str = "auto",
    source: str = "",
    path: Path | None = None,
) -> Path:
    """What `launch/convert.py` does: the model of a workdir out to a format, or one in from a `source`.

    Args:
      workdir: is read, or with `source` made.
      to, out, dtype: format of `EXPORTS`, what to make, and the dtype of its weights.
      step, weights: of the checkpoint, as `open_experiment` has them.
      source, path: format of `IMPORTS`, and what to read.

    Returns:
      what was made.

    Raises:
      ValueError: in one line, for what cannot be done; nothing is made then.
    """
    if bool(source) == bool(to):
        raise ValueError("give one of --to=FORMAT (with --out=PATH) and --from=FORMAT (with --path=FOLDER)")
    needed, unused = ("out", "path") if to else ("path", "out")
    given = {"out": out, "path": path}
    if (needed_path := given[needed]) is None:
        raise ValueError(f"--{needed} is missing; give --{needed}=PATH")
    if given[unused] is not None:
        raise ValueError(f"--{unused} has no use with --{'to' if to else 'from'}; leave it out")
    backend = start_backend("cpu")
    if source:
        import_model(source, needed_path, workdir)
        return workdir
    _check("workdir", workdir, "folder")
    _check("out", needed_path, "path to make")
    export_model(open_experiment(workdir, backend, step, weights=weights), to, needed_path, dtype)
    return needed_path


def export_model(experiment: Experiment, to: str, out: Path, dtype: str = "float32") -> None:
    """Writes a model to `out`, which must not be there. Raises ValueError, in one line, for what cannot be done."""
    with _made_whole(out, "out") as partial:
        EXPORTS[to](experiment, partial, dtype)


def import_model(source: str, path: Path, workdir: Path) -> None:
    """Makes a workdir, which must not be there, of a model in `path`. Raises ValueError, in one line, if it cannot."""
    _check("path", path, "folder")
    with _made_whole(workdir, "workdir") as partial:
        IMPORTS[source](path, partial)


def with_base(config: Config, workdir: Path | str, overrides: Collection[str] = ()) -> Config:
    """The config with model and tokenizer of its base: those that `workdir` began with, or a workdir or Hugging Face
    folder has. Raises ValueError, in one line, for a base that is none of these, or an override against it."""
    if not config.base:
        return config
    path = Path(config.base).expanduser()
    if workdir and (Path(workdir) / "config.json").is_file():
        return config.with_base(Config.load(Path(workdir)), overrides)
    if is_huggingface(path):
        return config.with_base(our_config(read_json(path / "config.json"), path), overrides)
    if not (path / "config.json").is_file():
        raise ValueError(f"base={config.base} must be a workdir or a Hugging Face folder (no config.json there)")
    return config.with_base(Config.load(path), overrides)


def import_base(config: Config, workdir: Path) -> None:
    """Makes a workdir of a base in a Hugging Face folder, in `workdir`, unless it is there."""
    path, inside = Path(config.base).expanduser(), workdir / BASE_FOLDER
    if config.base and not inside.exists() and is_huggingface(path):
        import_model("huggingface", path, inside)


def is_huggingface(path: Path) -> bool:
    """Whether a folder has a config.json of theirs."""
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def _check(flag: str, path: Path, kind: str) -> None:
    if fault := fault_of(path, kind):
        raise ValueError(f"--{flag}={printable_path(path)} {fault}")


@contextmanager
def _made_whole(path: Path, flag: str) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end; nothing is left if anything goes wrong."""
    _check(flag, path, "path to make")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.partial")
    _remove(partial)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
