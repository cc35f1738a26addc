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
from tale_jax.data.prepare import BASE_FOLDER
from tale_jax.runs.experiment import Experiment

EXPORTS: dict[str, Callable[[Experiment, Path, str], None]] = {
    "huggingface": export_huggingface,
    "gguf": export_gguf,
    "ollama": export_ollama,
}
IMPORTS: dict[str, Callable[[Path, Path], None]] = {"huggingface": import_huggingface}


def export_model(experiment: Experiment, to: str, out: Path, dtype: str = "float32") -> None:
    """Writes a model to `out`, which must not be there. Raises ValueError, in one line, for what cannot be done."""
    with _made_whole(out, "out") as partial:
        EXPORTS[to](experiment, partial, dtype)


def import_model(source: str, path: Path, workdir: Path) -> None:
    """Makes a workdir, which must not be there, of a model in `path`. Raises ValueError, in one line, if it cannot."""
    if not path.is_dir():
        raise ValueError(f"--path={path} must be a folder; give the one that holds config.json")
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


@contextmanager
def _made_whole(path: Path, flag: str) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end; nothing is left if anything goes wrong."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"--{flag}={path} must not exist yet, so that nothing is lost; remove it or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
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
