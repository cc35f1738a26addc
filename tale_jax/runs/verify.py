"""Is a workdir what was written into it? Every file against its digests, and what can be mended.

    python launch/verify.py --workdir=experiments/tales
    python launch/verify.py --workdir=experiments/tales --repair

What ties a workdir together: each checkpoint's manifest names its files, its settings, and the tokenizer and windows
it was trained beside, by their digests; each split's manifest names its token stream and the tokenizer; `config.json`
has a digest of its own. Records (`metrics.jsonl` and so on) have none: they are read line by line, and a line torn by
a kill is told.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tale_jax.config import Config
from tale_jax.data.corpus import SPLITS
from tale_jax.data.prepare import BASE_FILE, load_tokenizer, read_base_file
from tale_jax.data.token_files import Manifest, check_tokens, load_manifest, seal_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.runs.experiment import check_belongs, check_windows
from tale_jax.training.checkpoint import (
    DAMAGED,
    check_checkpoint,
    facts_of_before,
    is_of_before,
    leftovers,
    read_manifests,
    saved_steps,
    set_aside,
    unsealed,
)
from tale_jax.utils.files import check_entries, iter_lines, write_atomically
from tale_jax.utils.locks import is_locked, writer_lock
from tale_jax.utils.manifests import files_below, write_manifest
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
    """Looks at every file of a workdir.

    Beside a run that is training, what it is writing at this moment is left out. Of a workdir with links out of it, or
    with what is no file, only that is told: reading it may never end.
    """
    try:
        check_entries(workdir)
    except ValueError as error:
        return Verification(0, [str(error)])
    found, folder, writes = Verification(), workdir / "checkpoints", is_locked(workdir)
    config = found.check("config.json", lambda: Config.load(workdir))
    tokenizer = found.check("tokenizer", lambda: load_tokenizer(workdir))
    if config and config.base:
        found.check(BASE_FILE, lambda: read_base_file(workdir))
    steps = [step for step in saved_steps(folder) if not (writes and step in unsealed(folder))]
    with Progress("verify", total=len(steps) + len(SPLITS), unit="parts") as progress:
        windows = {}
        for split in SPLITS:
            look = functools.partial(_check_split, workdir, split, tokenizer)
            windows[split] = found.check(f"windows/{split}", look, files=2)
            progress.advance()
        for step in steps:
            what, files, before = f"checkpoints/{step}", len(files_below(folder / str(step))) + 1, len(found.bad)
            manifest = found.check(what, functools.partial(_check_checkpoint, folder, step), files)
            if manifest and config and tokenizer:
                found.check(what, functools.partial(check_belongs, what, manifest, config, tokenizer), files=0)
            for split in filter(None, windows.values()):
                beside = manifest.get("windows", {}) if manifest else {}
                found.check(what, functools.partial(check_windows, what, beside, split), files=0)
            if writes and not (folder / str(step)).exists():  # the run let go of it since
                del found.bad[before:]
            progress.advance()
    if not writes:
        found.bad += [f"checkpoints/{path.name}: half-written, by a save that was killed" for path in leftovers(folder)]
    for name in RECORDS:
        if (workdir / name).exists():
            found.check(name, functools.partial(_check_records, workdir / name))
    return found


def _check_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    if is_of_before(folder, step):
        raise ValueError("it has no digests, as earlier versions wrote it; train.py and --repair give it some")
    return check_checkpoint(folder, step)


def _check_split(workdir: Path, split: str, tokenizer: Tokenizer | None) -> Manifest:
    manifest = load_manifest(workdir, split)
    check_tokens(workdir, manifest)
    if not manifest.sha256:
        raise ValueError("it has no digest, as earlier versions wrote it; train.py and --repair give it one")
    if tokenizer and manifest.tokenizer != tokenizer.fingerprint:
        raise ValueError("it was prepared with another tokenizer; restore the tokenizer from a copy, or prepare again")
    return manifest


def _check_records(path: Path) -> None:
    for number, line in enumerate(iter_lines(path), start=1):
        if line.strip() and not _is_record(line):
            torn = not line.endswith(b"\n")
            raise ValueError(f"line {number} is {'torn, by a kill' if torn else 'no JSON object'}")


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def repair(workdir: Path) -> Iterator[str]:
    """Mends what can be mended, as the one writer of the workdir, and yields a line before each thing that it does.

    Half-written folders are removed; damaged checkpoints and windows move to `damaged/`, where nothing reads them; a
    missing or damaged `config.json` comes back from the newest whole checkpoint; lines of records that are none are cut
    out. Windows are for `prepare.py` to make again, from the text.
    """
    with writer_lock(workdir, "verify --repair"):
        yield from _mend(workdir, workdir / "checkpoints")


def _mend(workdir: Path, folder: Path) -> Iterator[str]:
    for entry in leftovers(folder):
        yield f"removes checkpoints/{entry.name}, half-written"
        shutil.rmtree(entry, ignore_errors=True)
    for step in saved_steps(folder):
        if is_of_before(folder, step):
            yield f"gives checkpoints/{step}, of an earlier version, its digests"
            write_manifest(folder / str(step), facts_of_before(folder, step))
        try:
            check_checkpoint(folder, step)
        except ValueError as error:
            yield f"moves checkpoints/{step} to {DAMAGED}/: {error}"
            set_aside(folder, step)
    for split in SPLITS:
        try:
            manifest = load_manifest(workdir, split)
            check_tokens(workdir, manifest)
        except ValueError as error:
            for path in (workdir / "windows").glob(f"{split}.*"):
                yield f"moves windows/{path.name} to {DAMAGED}/; prepare.py and train.py make it again ({error})"
                (workdir / DAMAGED).mkdir(exist_ok=True)
                path.replace(workdir / DAMAGED / path.name)
        else:
            if not manifest.sha256:
                yield f"gives windows/{split}, of an earlier version, its digest"
                seal_tokens(workdir, manifest)
    yield from _mend_config(workdir, read_manifests(folder))
    for name in RECORDS:
        yield from _mend_records(workdir / name)


def _mend_config(workdir: Path, manifests: dict[int, dict[str, Any]]) -> Iterator[str]:
    try:
        Config.load(workdir)
    except ValueError as error:
        for step in sorted(manifests, reverse=True):
            if "settings" in manifests[step]:
                yield f"restores config.json from checkpoint {step} ({error})"
                Config.from_json(manifests[step]["settings"], f"checkpoint {step}").save(workdir)
                return


def _mend_records(path: Path) -> Iterator[str]:
    lines = [line.rstrip(b"\n") for line in iter_lines(path) if line.strip()]
    kept = [line for line in lines if _is_record(line)]
    if len(kept) < len(lines):
        yield f"cuts {len(lines) - len(kept)} lines that are no records out of {path.name}"
        write_atomically(path, b"\n".join([*kept, b""]))
