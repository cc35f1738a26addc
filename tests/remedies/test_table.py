"""Every message has a test that follows its remedy, and what messages name (flags, settings, files) is there."""

import ast
import re
from pathlib import Path

import pytest
from remedies import messages as messages_module
from remedies.messages import ROOT, Message, messages
from remedies.table import REMEDIES, named_tests

from tale_jax.config import settings

ALL = messages()
SETTINGS = settings()
GROUPS = {name.partition(".")[0] for name in SETTINGS if "." in name}


def test_every_message_has_a_test():
    without = [f"{message.key}: {message.template}" for message in ALL if not named_tests(message)]
    assert not without, "\n".join(["write a test that follows each, and name it in tests/remedies/table.py:", *without])


def test_every_row_of_the_table_is_of_a_message():
    stale = [
        f"{file}: {part}"
        for file, rows in REMEDIES.items()
        for part in rows
        if not any(message.file.startswith(file) and part in message.template for message in ALL)
    ]
    assert not stale, "\n".join(["no message has these any more:", *stale])


def test_every_test_of_the_table_exists():
    defined: dict[str, set[str]] = {}
    for name in sorted({test for message in ALL for test in named_tests(message)}):
        file, _, function = name.partition("::")
        if file not in defined:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function.startswith("test_") and function in defined[file], name


def found_in(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    (tmp_path / "tale_jax").mkdir(exist_ok=True)
    (tmp_path / "tale_jax" / "x.py").write_text(source)
    monkeypatch.setattr(messages_module, "ROOT", tmp_path)
    return messages()


@pytest.mark.parametrize(
    ("source", "templates"),
    [
        ("def f():\n    raise ValueError('no advice at all')", ["no advice at all"]),
        ("def f(x):\n    raise ValueError(f'{x} is bad; ' + 'try 3')", ["{} is bad; try 3"]),
        ("def f(x):\n    return f'use --{x} instead'", ["use --{} instead"]),
        ("def f(x):\n    raise ValueError(f'{x} is bad; {advice()}')\n", ["{} is bad; {}"]),
        ("class A:\n    def f(self):\n        self.remedy = 'remove it and go on'", ["remove it and go on"]),
        ("def f():\n    'Use it as a docstring.'\n    return setting(3, 'use nothing')", []),
        ("def f():\n    return 'a title without a word that tells'", []),
        ("def f(x):\n    print('run this once more', file=x)", ["run this once more"]),
    ],
)
def test_messages_are_found(source, templates, tmp_path, monkeypatch):
    assert [message.template for message in found_in(source, tmp_path, monkeypatch)] == templates


# What messages name.

FLAG = re.compile(r"(?<![\w-])--((?:no)?[a-z]\w*(?:\.\w+)*)")
SETTING = re.compile(rf"(?<![\w./-])((?:{'|'.join(sorted(GROUPS))})\.[a-z]\w*)(?=\W|$)(?!\()")
OTHER_FLAGS = {"name", "help"}  # `--name=value` stands for any flag; `--help` is of all scripts
DEFINED = set(
    re.findall(
        r"(?:DEFINE_\w+|define_path)\(\s*\"(\w+)\"",
        "".join(path.read_text() for path in sorted((ROOT / "launch").glob("*.py"))),
    )
)


def test_a_setting_is_advised_as_it_is_typed():
    """`set --config.model.num_heads=2`, and not `set model.num_heads=2`, which no script takes."""
    told = re.compile(r"\b(?:try|set|use|or|to|raise|lower) ([a-z_]+(?:\.[a-z_]+)?)=")
    for message in ALL:
        for name in told.findall(message.template):
            assert name not in SETTINGS, f"{message.key}: {name} is not given as --config.{name}: {message.template}"


def test_what_messages_name_is_there():
    for message in ALL:
        text = message.template.replace("{}", "\0")
        for flag in FLAG.findall(text):
            name, _, setting = flag.partition(".")
            assert name in DEFINED | OTHER_FLAGS, f"{message.key}: --{flag} is a flag of no script"
            if setting and name == "config" and "\0" not in text[text.index(flag) :][: len(flag) + 1]:
                assert setting in SETTINGS, f"{message.key}: --{flag} is no setting"
        for name in SETTING.findall(text):
            assert name in SETTINGS or name.endswith((".json", ".jsonl")), f"{message.key}: {name} is no setting"
        for path in re.findall(r"(?:launch|configs)/\w+\.py", text):
            assert (ROOT / path).is_file() or path == "configs/NAME.py", f"{message.key}: {path}"
        for setting, value in re.findall(r"([a-z_]+\.[a-z_]+)=([\w.]+)", text):
            if setting in SETTINGS and SETTINGS[setting].choices:
                assert value in SETTINGS[setting].choices, f"{message.key}: {setting}={value}"
