"""Workdirs that someone else made: mutated, signed anew, and read by everything that reads a workdir, in one process.

`mutate` makes one; `python tests/faults/hostile.py BASE SECRET` reads folders, one a line of stdin, and answers with
one line of JSON for each: what each reader said, and whether anything of the folder was run, or led out of it.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HUGGINGFACE = "huggingface"  # folder of a workdir with the same model in Hugging Face's format
MEMORY = 1 << 30  # bytes that readers may take beyond what a sound workdir takes

# Making one.

NUMBERS = [-1, 0, 1, 7, 1 << 20, 1 << 31, 1 << 53, 1 << 63, 10**400, -(10**40), 0.5, -0.0, 1e308, float("nan")]
NAMES = ["", "..", "../../../../etc/passwd", "/dev/zero", "\0", "\ud800", "|O", "<f8", "a" * 100_000, "\x1b[2J", "९"]
OTHERS = [None, True, [], {}, [[]], {"": {}}, [0] * 10_000, {"format": 3}, "float32", "auto"]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def deep(rng: random.Random) -> str:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    depth = rng.choice([100, 5_000, 200_000])
    return opening * depth + "0" + closing * depth


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_json(text: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice([deep(rng), "", "null", "[]", "{}", "\ufeff{}", "1" * 10_000, '"', text + text, text[:-3]])
    try:
        value = json.loads(text)
        list(places(value))
    except (ValueError, RecursionError):  # by an earlier change
        return text + "}"
    for _ in range(rng.choice([1, 1, 2, 5])):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        action = rng.randrange(6)
        if action == 0 and isinstance(container, dict):
            container[rng.choice(NAMES)] = container.pop(key)
        elif action == 1:
            del container[key]
        elif action == 2 and isinstance(container, dict):
            container[rng.choice(["new", "__class__", *NAMES])] = rng.choice(NUMBERS)
        else:
            container[key] = copy.deepcopy(rng.choice([*NUMBERS, *NAMES, *OTHERS]))
    return json.dumps(value)


def mutate_bytes(content: bytes, rng: random.Random, canary: Path) -> bytes:
    changed, action = bytearray(content), rng.randrange(7)
    if action == 0 and changed:
        for _ in range(rng.choice([1, 3, 100])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif action == 1:
        del changed[rng.randrange(len(changed) + 1) :]
    elif action == 2 and changed:
        place = rng.randrange(len(changed))
        changed[place:place] = rng.choice([b"\xff" * 10, b"\0" * 1000, rng.randbytes(20), changed[:50]])
    elif action == 3:
        changed = bytearray(pickle.dumps(Payload(canary)))
    elif action == 4:
        changed = bytearray(rng.randbytes(rng.choice([0, 1, 100, 10_000])))
    elif action == 5:  # as a field of a message: a table of a tokenizer's normaliser, which is a program of a kind
        table = rng.choice([rng.randbytes(300), b"\xff\xff\xff\x7f" + rng.randbytes(64), b"\x40\0\0\0" + b"\xff" * 80])
        table = b"\x12" + varint(len(table)) + table
        changed += b"\x1a" + varint(len(table)) + table
    else:
        changed += pickle.dumps(Payload(canary))
    return bytes(changed)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A header that lies, before the same arrays."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = mutate_json(content[8:end].decode(errors="replace"), rng).encode("utf-8", "surrogatepass")
    claimed = rng.choice([*[len(header)] * 6, 0, len(header) - 1, 1 << 20, 1 << 40, (1 << 64) - 1])
    return max(0, claimed).to_bytes(8, "little") + header + content[end:]


def varint(number: int) -> bytes:
    parts = [number >> 7 * i & 0x7F for i in range(max(1, -(-number.bit_length() // 7)))]
    return bytes([part | 0x80 for part in parts[:-1]] + parts[-1:])


def free_place(folder: Path, name: str) -> Path:
    """A path in the folder that nothing has."""
    return next(path for number in itertools.count() if not os.path.lexists(path := folder / f"{name}{number or ''}"))


def replace_entry(path: Path, rng: random.Random, secret: Path) -> None:
    """Another kind of thing in the place of a file or folder."""
    is_folder = path.is_dir()
    aside = free_place(path.parent, "aside")
    path.rename(aside)
    kind = rng.randrange(7)
    if kind == 0:
        path.symlink_to(secret / ("folder" if is_folder else "file"))
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        with path.open("wb") as file:
            file.truncate(1 << rng.choice([29, 40, 43]))
    elif kind == 3:
        path.symlink_to(path.name)  # to itself
    elif kind == 4:
        path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "/etc/passwd", "/"]))
    elif kind == 5:
        (path / "a" / "b").mkdir(parents=True)
    else:
        path.symlink_to(aside.name)  # which is inside, and harmless


def add_entry(workdir: Path, rng: random.Random, secret: Path) -> None:
    """Something that no run makes."""
    checkpoints = workdir / "checkpoints"
    names = ["-1", "00", "9" * 30, "²", "1e3", " 4", "4.orbax-checkpoint-tmp", "\n5", "6", ".saving", "CON"]
    kind = rng.randrange(4)
    if kind == 0:
        (checkpoints / rng.choice(names)).mkdir(exist_ok=True)
    elif kind == 1:
        (checkpoints / rng.choice(names)).symlink_to(rng.choice([secret / "folder", checkpoints / "2"]))
    elif kind == 2:
        links = [".lock", "log.txt", "config.json.partial", ".writable", "report.html", "samples.jsonl", "damaged"]
        path = workdir / rng.choice(links)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.symlink_to(secret / ("folder" if path.name == "damaged" else "file"))
    else:
        path = workdir
        for _ in range(rng.choice([3, 300])):
            path = path / "deep"
            path.mkdir()


def is_plain(path: Path) -> bool:
    """Whether signing can read it: no link (which would be written through), no pipe (which waits), nothing huge."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 28


def sign(workdir: Path) -> None:
    """Gives everything the digests that fit it, as its maker can."""
    from tale_jax.utils.manifests import digest_of, write_manifest

    for path in (workdir / "config.json", *(workdir / "windows").glob("*.json")):
        with contextlib.suppress(Exception):
            if not is_plain(path):
                continue
            values = json.loads(path.read_text())
            if path.parent.name == "windows":
                from tale_jax.utils.manifests import hash_file

                if is_plain(path.with_suffix(".bin")):
                    values["sha256"] = hash_file(path.with_suffix(".bin"))[0]
            values.pop("digest", None)
            path.write_text(json.dumps(values | {"digest": digest_of(values)}))
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        with contextlib.suppress(Exception):
            if folder.parent.is_symlink() or folder.is_symlink():
                continue
            if not all(is_plain(path) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()):
                continue
            facts = json.loads((folder / "manifest.json").read_text())
            facts = {name: value for name, value in facts.items() if name not in ("files", "sha256")}
            write_manifest(folder, facts)


def mutate(workdir: Path, rng: random.Random, secret: Path, canary: Path) -> str:
    """Changes a sound workdir in place; returns what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        entries = sorted(path for path in workdir.rglob("*") if not path.is_symlink())
        files = [path for path in entries if path.is_file() and path.suffix != ".bin"]
        files = [path for path in files if 0 < path.stat().st_size < 1 << 24]
        action = rng.random()
        if action < 0.15:
            path = rng.choice(entries)
            replace_entry(path, rng, secret)
        elif action < 0.22:
            path = workdir
            add_entry(workdir, rng, secret)
        elif action < 0.3:
            path = rng.choice(entries)
            path.rename(free_place(path.parent, "gone")) if path.exists() else None
        else:  # of each folder as likely: most files are arrays of checkpoints
            folder = rng.choice(sorted({path.parent for path in files}))
            path = rng.choice([path for path in files if path.parent == folder])
            content = path.read_bytes()
            if content[:1] in b"{[" and rng.random() < 0.85:
                text = content.decode(errors="replace")  # an earlier change may have met a character midway
                lines = text.splitlines() if path.suffix == ".jsonl" else [text]
                number = rng.randrange(len(lines))
                lines[number] = mutate_json(lines[number], rng)
                path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
            elif path.suffix == ".safetensors" and rng.random() < 0.7:
                path.write_bytes(mutate_safetensors(content, rng))
            else:
                path.write_bytes(mutate_bytes(content, rng, canary))
        done.append(str(path.relative_to(workdir)))
    if rng.random() < 0.6:
        sign(workdir)
        done.append("signed")
    return ", ".join(done)


# Reading them.

RUNS_CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork")


def readers(base: Path) -> dict[str, Callable[[Path], Any]]:
    """Everything that reads a workdir, as the scripts call it."""
    from tale_jax.config import Config
    from tale_jax.convert.huggingface import read_huggingface
    from tale_jax.data.prepare import prepare
    from tale_jax.hardware.backend import start_backend
    from tale_jax.inference.sampler import Sampler, SampleSettings
    from tale_jax.runs.evaluate import evaluate
    from tale_jax.runs.experiment import check_belongs, num_weights, open_experiment
    from tale_jax.runs.report import write_report
    from tale_jax.runs.resume import resumed_config
    from tale_jax.runs.verify import repair, verify
    from tale_jax.training.checkpoint import Checkpoints, check_size, read_manifests
    from tale_jax.training.step import make_trainer

    backend = start_backend("cpu")
    sound = Config.load(base)
    tokenizer = prepare(sound, base).tokenizer
    trainer = make_trainer(sound, backend, "float32", tokenizer.bos_id)

    def sample(workdir: Path) -> None:
        opened = open_experiment(workdir, backend)
        settings = SampleSettings(max_tokens=3, temperature=0.0)
        Sampler(opened.model, opened.params, opened.tokenizer).sample("Once", settings, num_samples=1)

    def score(workdir: Path) -> None:
        evaluate(open_experiment(workdir, backend), num_samples=0)

    def resume(workdir: Path) -> None:  # what train does before it compiles
        config = Config.load(workdir)
        config, _ = resumed_config(config, workdir)
        prepared = prepare(config, workdir)
        prepared.tokens("train")
        for step, manifest in read_manifests(workdir / "checkpoints").items():
            check_size(workdir / "checkpoints" / str(step), manifest, "params", 4 * num_weights(config))
        checkpoints = Checkpoints(workdir, 2)
        try:
            check_belongs("the checkpoint", checkpoints.manifest, config, prepared.tokenizer)
            if dataclasses.replace(config, total_steps=sound.total_steps).model == sound.model:
                checkpoints.restore(trainer.abstract_state, trainer.state_shardings)
        finally:
            checkpoints.close()

    return {
        "config": Config.load,
        "sample": sample,
        "evaluate": score,
        "report": lambda workdir: write_report([workdir]),
        "import": lambda workdir: read_huggingface(workdir / HUGGINGFACE),
        "verify": verify,
        "resume": resume,
        "repair": lambda workdir: list(repair(workdir)),
        "after repair": sample,
    }


def main(base: Path, secret: Path) -> None:
    seen: list[str] = []
    watched = follows_links = False  # a folder of Hugging Face's cache is made of links to blobs

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watched:
            return
        if event in RUNS_CODE:
            seen.append(f"{event} {arguments!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if follows_links or path.startswith(("/proc", "/sys")):
                return
            if os.path.realpath(path).startswith(str(secret)):
                seen.append(f"opens {path}")

    found = readers(base)
    for name, read in found.items():  # what a sound one takes, and whatever is compiled
        if name not in ("repair", "resume"):
            read(base)
    sys.addaudithook(audit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        said = {}
        for name, read in found.items():
            start, watched, follows_links = time.process_time(), True, name == "import"
            try:
                read(Path(line.rstrip("\n")))
                outcome = "read"
            except (ValueError, OSError) as error:
                outcome = f"refused: {' '.join(str(error).split())[:200]}"
            except BaseException as error:
                import traceback

                frames = traceback.extract_tb(error.__traceback__)[-3:]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
                outcome = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]} at {where}"
            watched = False
            said[name] = [outcome, round(time.process_time() - start, 2)]
        print(json.dumps({"said": said, "seen": seen}), file=answers, flush=True)
        seen.clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
