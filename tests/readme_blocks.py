"""Blocks of output in the README files: where each comes from, whether it is still true, and how it is made anew.

A fenced block with `$ command` lines and output says in the comment above it where the output comes from:

    <!-- output: run free='speed|time' numbers=15% from='2026-11-26, two cores of a Xeon, jax 0.12' -->
    <!-- output: from='2026-11-23, two cores of a Xeon with AMX, jax 0.12' -->

`run`: a test runs the commands (tests/test_readme_blocks.py). Every line that is shown must come, in this order, with
the same words; `…` stands for anything, alone on its line for any lines. Numbers may be others, or differ by at most
`numbers`. Of lines in which `free` is found only what stands before two spaces is compared. `small`: flags that the
test takes in place of those shown, so that it is fast. Where numbers are not compared, `from` says which machine they
are of, and when.

Without `run`: what no test has the time, or the machine, to run. Then `from` names both.

    make readme-blocks     # runs every `run` block in full, in the folder of the repository, and puts its numbers in
"""

import contextlib
import dataclasses
import datetime
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "launch/README.md", "tale_jax/planning/README.md", "tale_jax/bench/README.md")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
KEYS = {"run", "free", "numbers", "small", "from"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of output: `options` are those of its comment, None where it has none; `first_line` counts from 0."""

    file: str
    first_line: int
    lines: tuple[str, ...]
    options: dict[str, str] | None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.first_line + 1}"

    @property
    def steps(self) -> list[tuple[str, list[str]]]:
        """Each command, with the lines shown below it."""
        steps: list[tuple[str, list[str]]] = []
        for line in self.lines:
            if line.startswith("$ "):
                steps.append((line.removeprefix("$ "), []))
            else:
                steps[-1][1].append(line)
        return steps


def find_blocks(root: Path = ROOT, files: Sequence[str] = FILES) -> Iterator[Block]:
    """Every fenced block in which a command is followed by output."""
    for name in files:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        fences = [i for i, line in enumerate(lines) if line.startswith("```")]
        for start, end in zip(fences[::2], fences[1::2], strict=True):
            body = tuple(lines[start + 1 : end])
            if body and body[0].startswith("$ ") and any(not line.startswith("$ ") for line in body):
                yield Block(name, start + 1, body, read_options(lines[start - 1]))


def read_options(comment: str) -> dict[str, str] | None:
    """What `<!-- output: … -->` says, None for another line. Raises ValueError for a word that means nothing."""
    found = re.fullmatch(r"<!-- output: (.*) -->", comment)
    if found is None:
        return None
    pairs = (word.partition("=") for word in shlex.split(found[1]))
    options = {name: value for name, _, value in pairs}
    if unknown := options.keys() - KEYS:
        raise ValueError(f"{comment}: no such words: {', '.join(unknown)}")
    return options


def with_small_flags(words: list[str], small: str) -> list[str]:
    """The words of a command with some flags in place of those of the same names; others are added."""
    flags = shlex.split(small)
    names = {flag.partition("=")[0] for flag in flags}
    kept = [word for word in words if word.partition("=")[0] not in names]
    at = next((i for i, word in enumerate(kept) if word.startswith("--")), len(kept))
    return kept[:at] + flags + kept[at:]


def run_command(command: str, folder: Path, small: str = "", timeout: float = 900) -> list[str]:
    """What `python launch/NAME.py …` prints on stdout and stderr when it is run in `folder`."""
    python, script, *words = shlex.split(command)
    if python != "python" or not re.fullmatch(r"launch/\w+\.py", script):
        raise ValueError(f"{command}: only launch scripts are run")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "COLUMNS")} | {"PYTHONUNBUFFERED": "1"}
    words = with_small_flags(words, small) if small else words
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=timeout,
    )  # fmt: skip
    return done.stdout.decode("utf-8", errors="replace").splitlines()


def mismatch(shown: str, printed: str, options: dict[str, str]) -> str:
    """Why a printed line is not the one that is shown, "" when it is."""
    if "…" not in shown and options.get("free") and re.search(options["free"], shown):
        shown, printed = (re.split(r"(?<=\S)\s{2,}", line)[0] for line in (shown, printed))
        same = _words(shown) == _words(printed)
        return "" if same else "it begins differently"
    pattern = ".*".join(re.escape(part) for part in _words(shown).split("…"))
    if not re.fullmatch(pattern, _words(printed)):
        return "the words differ"
    if (tolerance := options.get("numbers")) and "…" not in shown:
        for old, new in zip(_numbers(shown), _numbers(printed), strict=True):
            if abs(old - new) > float(tolerance.rstrip("%")) / 100 * abs(old):
                return f"{old:g} is {new:g} now"
    return ""


def refreshed(shown: Sequence[str], printed: Sequence[str], options: dict[str, str]) -> list[str]:
    """The shown lines as they are printed now. Raises ValueError with the first that does not come."""
    lines, rest = [], list(printed)
    for line in shown:
        if line.strip() == "…":
            lines.append(line)
            continue
        reasons = [mismatch(line, candidate, options) for candidate in rest]
        if "" not in reasons:
            near = next((f": {reason} in {c!r}" for c, reason in zip(rest, reasons) if "now" in reason), "")
            raise ValueError(f"{line!r} is not printed any more{near}; printed is:\n" + "\n".join(printed))
        place = reasons.index("")
        lines.append(line if "…" in line else rest[place].rstrip())
        del rest[: place + 1]
    return lines


def _words(line: str) -> str:
    """The line without its numbers, with one space for many and one dash for the rule of a table."""
    return " ".join(re.sub("─+", "─", NUMBER.sub("#", line)).split())


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "").replace("−", "-")) for number in NUMBER.findall(line)]


def main() -> None:
    """Runs every `run` block in full and writes its output into the file; says which could not be run or matched."""
    for block in [block for block in find_blocks() if block.options and "run" in block.options]:
        new: list[str] = []
        try:
            for command, shown in block.steps:
                new += [f"$ {command}", *refreshed(shown, run_command(command, ROOT), block.options or {})]
        except (ValueError, subprocess.TimeoutExpired) as error:
            print(f"{block.place}: left as it is: {error}", file=sys.stderr)
            continue
        path = ROOT / block.file
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[block.first_line : block.first_line + len(block.lines)] = new
        if "from" in (block.options or {}):
            comment = lines[block.first_line - 2]
            lines[block.first_line - 2] = re.sub(r"from='[^']*'", f"from='{_here()}'", comment)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{block.place}: written")


def _here() -> str:
    """Today, this machine and its jax, for `from`."""
    import jax

    from tale_jax.hardware.machine import cpu_name

    return f"{datetime.datetime.now(datetime.UTC).date()}, {cpu_name()}, jax {jax.__version__}".replace("'", "")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with contextlib.suppress(KeyboardInterrupt):
        main()
