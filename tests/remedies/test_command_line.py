"""A command that is refused is corrected as the error says, and then it runs: launch/cli.py, and the recipes."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from helpers import FLAG_DEFINITIONS, ROOT

# A script as those in launch/. Each command line of stdin is run in a fork of it, so that all of them start fast.
SCRIPT = """
import io, json, os, sys, traceback
sys.argv[0] = "launch/tiny.py"
sys.path.insert(0, "launch")
import cli
import tale_jax.config
FLAG_DEFINITIONS
OUT = cli.define_path("out", "file to write", "a file")


def main(argv):
    if CONFIG.value is not None:
        tale_jax.config.Config.build(CONFIG.value)


for arguments in json.load(sys.stdin):
    out, into = os.pipe()
    if not (child := os.fork()):
        os.dup2(into, 1), os.dup2(into, 2)
        sys.argv[1:] = arguments
        cli.run(main)
    os.close(into)
    written = b"".join(iter(lambda: os.read(out, 65536), b"")).decode()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written], ensure_ascii=False))
""".replace("FLAG_DEFINITIONS", FLAG_DEFINITIONS)
Result = tuple[int, str]


@pytest.fixture(scope="module")
def call() -> Callable[[list[list[str]]], list[Result]]:
    """Runs command lines of a script; for each its exit code and what it wrote."""

    def call(lines: list[list[str]]) -> list[Result]:
        env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, input=json.dumps(lines), cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return call


BASE = ["--workdir=w", "--config=configs/base.py"]


def replaced(arguments: list[str], wrong: str, pattern: str) -> Callable[[str], list[str]]:
    """The same command line with what the message says (the group of `pattern`) in place of `wrong`."""

    def correct(message: str) -> list[str]:
        found = re.search(pattern, message)
        assert found, message
        return [argument.replace(wrong, found[1]) for argument in arguments]

    return correct


def value(flag: str, pattern: str) -> tuple[list[str], Callable[[str], list[str]]]:
    """A flag with a wrong value, and with the value that the message names."""
    arguments = [*BASE, flag]
    return arguments, replaced(arguments, flag.partition("=")[2], pattern)


def with_new(name: str, old: str) -> tuple[list[str], Callable[[str], list[str]]]:
    arguments = [*BASE, old]
    return arguments, replaced(arguments, old.partition("=")[0], name)


MEANT = r"did you mean (--[\w.]+)\?"
# A wrong command line, and from its message a right one.
MISTAKES = {
    "a flag is missing": (["--config=configs/base.py"], lambda m: [*BASE[1:], re.search(r"give (--\w+=\w+)", m)[1]]),
    "a flag is misspelled": with_new(MEANT, "--wrkdir=x"),
    "a flag that is like none": (
        [*BASE, "--zzzzzzzz=1"],
        lambda m: [*BASE, f"{re.search(r'there is .*(--count)', m)[1]}=1"],
    ),
    "beyond the bounds": value("--top_p=1.5", r"\[0\.0, (1\.0)\]"),
    "no integer": value("--count=1.5", r"the default is (3)"),
    "no truth": value("--json=maybe", r"must be (true) or false"),
    "no choice of these": value("--split=vald", r"did you mean (\w+)\?"),
    "no choice at all": value("--split=zzzz", r"try --split=(\w+)"),
    "a flag without its value": ([*BASE, "--count"], lambda m: [*BASE, "--count=3"] if "--name=value" in m else []),
    "a stray word": ([*BASE, "stray"], lambda m: BASE if "is not a flag" in m else []),
    "no number for a setting": value("--config.seed=abc", r"the default is (0)"),
    "a setting is misspelled": with_new(MEANT, "--config.sed=1"),
    "a setting of a misspelled group": with_new(MEANT, "--config.modl.embed_dim=96"),
    "a setting without its group": with_new(MEANT, "--config.embed_dim=96"),
    "a setting that is like none": (
        [*BASE, "--config.model.zzzz=96"],
        lambda m: [*BASE, f"--config.model.{re.search(r'model has num_layers, (embed_dim)', m)[1]}=96"],
    ),
    "a setting that has a new name": with_new(r"it is now (--[\w.]+)", "--config.model.word_dropout=0.1"),
    "a setting that was removed": (
        [*BASE, "--config.optimizer.cautious=1"],
        lambda m: BASE if "leave it out" in m else [],
    ),
    "a setting without a config": (
        ["--workdir=w", "--config.seed=1"],
        lambda m: [
            "--workdir=w",
            re.search(r"give (--config=configs/)NAME.py before it", m)[1] + "base.py",
            "--config.seed=1",
        ],
    ),
    "a setting before its config": (
        ["--workdir=w", "--config.seed=1", "--config=configs/base.py"],
        lambda m: [*BASE, "--config.seed=1"] if "give --config=FILE before its settings" in m else [],
    ),
    "a recipe is misspelled": (
        ["--workdir=w", "--config=configs/bse.py"],
        lambda m: ["--workdir=w", f"--config={re.search(r'did you mean (.*)[?]', m)[1]}"],
    ),
    "a recipe that is like none": (
        ["--workdir=w", "--config=nowhere/zzzzzz.py"],
        lambda m: ["--workdir=w", f"--config={re.search(r'there is ([^,]+),', m)[1]}"],
    ),
    "a variant that is none": (
        ["--workdir=w", "--config=configs/tales.py:big"],
        lambda m: ["--workdir=w", f"--config={re.search(r'there is ([^ ]+) and', m)[1]}"],
    ),
}
MISTAKES["a file with / at its end"] = value("--out=new/", r"--out=(\w+)/ must be a file, and / at its end says folder")
MISTAKES["a folder for a file"] = (
    [*BASE, "--out=tests"],
    lambda m: [*BASE, "--out=tests/new.txt"] if "give the path of a file" in m else [],
)
MISTAKES["a folder for a recipe"] = (
    ["--workdir=w", "--config=configs"],
    lambda m: ["--workdir=w", f"--config={re.search(r'as (configs/.*py)$', m)[1]}"],
)
MISTAKES["a setting by the name of another program"] = with_new(MEANT, "--lr=0.001")
MISTAKES["a group for a setting"] = (
    [*BASE, "--config.model=96"],
    lambda m: [*BASE, re.search(r"as (--config\.model\.NAME=96)", m)[1].replace("NAME", "embed_dim")],
)


def test_a_command_that_is_corrected_as_it_is_told_works(call):
    """All in one process of Python, which forks for each."""
    refused = call([arguments for arguments, _ in MISTAKES.values()])
    corrected = []
    for (name, (_, correct)), (code, message) in zip(MISTAKES.items(), refused, strict=True):
        assert code == 2 and message.startswith("error: ") and message.count("\n") == 1, (name, message)
        corrected.append(correct(message))
        assert corrected[-1], (name, message)
    for name, arguments, (code, message) in zip(MISTAKES, corrected, call(corrected), strict=True):
        assert code == 0, (name, arguments, message)


@pytest.mark.parametrize("recipe", ["gpt2", "m2_air", "tales", "wikitext2"])
def test_the_variants_that_are_named_exist(recipe):
    module = importlib.import_module(f"configs.{recipe}")
    with pytest.raises(ValueError, match="is not a variant") as caught:
        module.get_config("none")
    variants = re.findall(rf"configs/{recipe}\.py:(\w+)", str(caught.value).partition("there is")[2])
    assert variants
    for variant in variants:
        assert module.get_config(variant).to_dict() != module.get_config().to_dict()
