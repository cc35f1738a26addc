"""Is a workdir what was written into it? Every file against its digests, and what can be mended.

    python launch/verify.py --workdir=experiments/tales
    python launch/verify.py --workdir=experiments/tales --repair

What ties a workdir together: each checkpoint's manifest names its files, the digest of the settings that decide what is
learned, and the tokenizer; each split's manifest names its token stream and the tokenizer; `config.json` has a digest of
its own. Records (`metrics.jsonl` and so on) have none: they are read line by line, and a line torn by a kill is told.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tale_jax.config import Config
from tale_jax.data.corpus import SPLITS
from tale_jax.data.token_files import check_tokens, load_manifest
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.runs.experiment import run_identity
from tale_jax.training.checkpoint import check_checkpoint, check_identity, leftovers, read_manifests, set_aside
from tale_jax.utils.manifests import files_below
from tale_jax.utils.progress import Progress

RECORDS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "quality.jsonl")


@dataclasses.dataclass
class Verification:
    """What was found.

    Attributes:
      checked: files that were looked at.
      bad: a line for each fault, the file first.
    """

    checked: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)

    def check(self, what: str, look: Callable[[], Any], files: int = 1) -> Any:
        """Counts the files, and keeps what `look` raises; returns what it returns, None where it raises."""
        self.checked += files
        try:
            return look()
        except (ValueError, OSError) as error:
            said = " ".join(str(error).split())
            self.bad.append(said if said.startswith(what) else f"{what}: {said}")
            return None


def verify(workdir: Path) -> Verification:
    """Looks at every file of a workdir. Raises ValueError when the folder is no workdir."""
    if not workdir.is_dir():
        raise ValueError(f"workdir={workdir} must be the folder of an experiment; there is no such folder")
    found = Verification()
    config = found.check("config.json", lambda: Config.load(workdir))
    tokenizer = found.check("tokenizer", lambda: Tokenizer.load(tokenizer_file(workdir)))
    folder = workdir / "checkpoints"
    steps = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal())
    with Progress("verify", total=len(steps) + len(SPLITS), unit="parts") as progress:
        for split in SPLITS:
            found.check(f"windows/{split}", lambda split=split: _check_split(workdir, split, tokenizer), files=2)
            progress.advance()
        for step in steps:
            what, files = f"checkpoints/{step}", len(files_below(folder / str(step))) + 1
            manifest = found.check(what, lambda step=step: check_checkpoint(folder, step), files)
            if manifest and config and tokenizer:
                identity = run_identity(config, tokenizer)
                found.check(what, lambda m=manifest, w=what, i=identity: check_identity(w, m, i), files=0)
            progress.advance()
    found.bad += [f"checkpoints/{entry.name}: half-written, by a save that was killed" for entry in leftovers(folder)]
    for name in RECORDS:
        if (workdir / name).exists():
            found.check(name, lambda name=name: _check_records(workdir / name))
    return found


def _check_split(workdir: Path, split: str, tokenizer: Tokenizer | None) -> None:
    manifest = load_manifest(workdir, split)
    check_tokens(workdir, manifest)
    if tokenizer and manifest.tokenizer != tokenizer.fingerprint:
        raise ValueError("it was prepared with another tokenizer; restore the tokenizer, or prepare again")


def _check_records(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line and not isinstance(json.loads(line), dict):
                raise ValueError
        except (ValueError, RecursionError):
            torn = number == len(lines)
            raise ValueError(f"line {number} is {'torn, by a kill' if torn else 'no JSON object'}") from None


def repair(workdir: Path) -> Iterator[str]:
    """Mends what can be mended, and yields a line for each thing done: what is bad is moved aside, never believed.

    Half-written folders go; damaged checkpoints move to `damaged/`; a missing or damaged `config.json` comes back from
    the newest whole checkpoint; torn lines of records are cut off. Token windows are for `prepare.py` to make again.
    """
    folder = workdir / "checkpoints"
    for entry in leftovers(folder):
        shutil.rmtree(entry)
        yield f"removed checkpoints/{entry.name}, half-written"
    for step in sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal()):
        try:
            check_checkpoint(folder, step)
        except ValueError as error:
            yield f"moved checkpoints/{step} to {set_aside(folder, step).relative_to(workdir)}: {error}"
    manifests = read_manifests(folder)
    try:
        Config.load(workdir)
    except ValueError as error:
        if manifests:
            step = max(manifests)
            Config.build(manifests[step]["settings"]).save(workdir)
            yield f"restored config.json from checkpoint {step} ({error})"
    for name in RECORDS:
        yield from _mend_records(workdir / name)


def _mend_records(path: Path) -> Iterator[str]:
    content = path.read_bytes() if path.exists() else b""
    kept = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(line), dict):
                kept.append(line + b"\n")
    if content and b"".join(kept) != content:
        path.write_bytes(b"".join(kept))
        yield f"cut lines that are no records out of {path.name}"
