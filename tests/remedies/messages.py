"""Every message of the program, found in its source: what is raised, and what else is said that advises something.

    python tests/remedies/messages.py        # the list: message, file, and the tests that follow its remedy

A message is known by its template, the text with {} for each value. `table.py` says which tests provoke it and then do
what it says.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tale_jax", "launch", "configs")
# What makes a line advice: a word that tells to do something, or a flag.
ADVICE = re.compile(
    r"\b(try|use|set|unset|give|remove|raise|lower|see|add|pip|mv|rm|cp|kill|stop it|wait until|download|restore|"
    r"update|convert|decompress|shorten|leave|put|close|name one|name another|write it|write the|rename|resume|export|"
    r"let it|run (?:it|this|the|launch)|choose (?:a|another)|make (?:room|the model|the env|env|clean)|goes on from|"
    r"correct (?:it|its|the|or)|prepare again|train (?:again|first|in)|did you mean|there (?:is|are)|it is now|"
    r"check its|look at|python launch|must be an array|install|activate)\b|--\w"
)
# Strings in calls of these are no lines for people, or describe a setting or flag and answer no mistake.
OTHER_CALLS = re.compile(r"setting|group|Rule|DEFINE_\w+|compile|sub|search|(full)?match|findall|split|startswith|get")
OTHER_FILES = {  # where only what is raised counts: words of tales, titles of plots, HTML
    "tale_jax/data/tales/grammar.py",
    "tale_jax/data/tales/lexicon.py",
    "tale_jax/runs/plots.py",
    "tale_jax/runs/report.py",
}


@dataclasses.dataclass(frozen=True)
class Message:
    """A line that the program may say: its template, where it stands, and whether it is raised."""

    file: str
    first_line: int
    last_line: int
    template: str
    raised: bool

    @property
    def key(self) -> str:
        return f"{self.file}:{self.first_line}"


def template_of(node: ast.expr) -> str | None:
    """The text of a string expression with {} for each value; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(v, ast.FormattedValue) else str(v.value) for v in node.values)  # type: ignore[attr-defined]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [template_of(node.left), template_of(node.right)]
        return None if sides == [None, None] else "".join("{}" if side is None else side for side in sides)
    return None


def messages() -> list[Message]:
    """All messages, in the order of files and lines."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
            found += _messages_in(function, file)
    return sorted(found, key=lambda message: (message.file, message.first_line))


def _messages_in(function: ast.AST, file: str) -> Iterator[Message]:
    todo: list[ast.AST] = [function]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            if _name_of(getattr(node.exc, "func", node.exc)) == "AssertionError":
                continue  # what cannot happen
            parts = [text for part in _arguments(node.exc) if (text := template_of(part)) is not None]
            if parts:
                yield Message(file, node.lineno, node.end_lineno or node.lineno, "; ".join(parts), True)
            todo += [part for part in _arguments(node.exc) if template_of(part) is None]
            continue
        if isinstance(node, ast.Call) and OTHER_CALLS.fullmatch(_name_of(node.func)):
            continue
        if isinstance(node, ast.expr) and (text := template_of(node)) is not None:
            if file not in OTHER_FILES and ADVICE.search(text) and " " in text.strip():
                yield Message(file, node.lineno, node.end_lineno or node.lineno, text, False)
            continue
        todo += [child for child in ast.iter_child_nodes(node) if not _is_docstring(child)]


def _arguments(call: ast.expr) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)] if isinstance(call, ast.Call) else []


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from remedies.table import named_tests

    for each in messages():
        print(f"{each.key}\n    {each.template[:140]}\n    {', '.join(named_tests(each)) or 'NO TEST'}")
