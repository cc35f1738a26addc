"""Every setting does something: its attribute is read in the package, from a value that is its group.

What an expression is, is followed through annotations, assignments and fields. A name alone would prove nothing, for
many groups have an `every_steps`.
"""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT

from tale_jax import config as config_module
from tale_jax.config import settings
from tale_jax.data.corpus import OPENERS

CONFIG = ROOT / "tale_jax" / "config.py"
FILES = sorted((ROOT / "tale_jax").rglob("*.py"))
NOT_A_USE = {"broken", "build", "_derived", "difference"}  # methods of config.py that check, fill in or compare


def last_name(annotation: ast.expr | None) -> str:
    """`Config` of Config, tale_jax.config.Config, "Config" and Config | None."""
    match annotation:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
        case ast.BinOp(left=left):
            return last_name(left)
    return ""


def class_fields(files: list[Path]) -> dict[str, dict[str, str]]:
    """Class → field or property → name of its class, over all files."""
    found: dict[str, dict[str, str]] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = found.setdefault(node.name, {})
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        fields[part.target.id] = last_name(part.annotation)
                    elif isinstance(part, ast.FunctionDef):
                        fields[part.name] = last_name(part.returns)
    return found


class Reads(ast.NodeVisitor):
    """Collects (class, attribute) of what is read of values whose class is known."""

    def __init__(self, fields: dict[str, dict[str, str]]):
        self.fields, self.found = fields, set[tuple[str, str]]()
        self.names: dict[str, str] = {}  # of variables, and of attributes as self.name → class

    def class_of(self, node: ast.AST) -> str:
        match node:
            case ast.Name(id=name):
                return self.names.get(name, "")
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if f"self.{name}" in self.names:
                return self.names[f"self.{name}"]
            case ast.Attribute(value=owner, attr=name):
                return self.fields.get(self.class_of(owner), {}).get(name, "")
            case ast.Call(func=ast.Name(id=name)) if name in self.fields:
                return name
            case ast.Call(func=ast.Attribute() as method):
                return self.class_of(method)
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found.add((self.class_of(node.value), node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.JoinedStr(values=parts), *_]):
                pattern = "".join(re.escape(p.value) if isinstance(p, ast.Constant) else "[a-z]+" for p in parts)
                kind = self.class_of(owner)
                self.found |= {(kind, name) for name in self.fields.get(kind, {}) if re.fullmatch(pattern, name)}
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.names = self.names, self.names | {"self": node.name}
        for method in node.body:  # what a constructor keeps
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                self.visit(method)
                self.names |= {name: kind for name, kind in self.kept.items() if name.startswith("self.")}
        self.generic_visit(node)
        self.names = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.names = self.names, dict(self.names)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.arg != "self":
                self.names[argument.arg] = last_name(argument.annotation)
        self.generic_visit(node)
        self.kept, self.names = self.names, before

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for left, right in pairs:
                if isinstance(left, ast.Name | ast.Attribute) and (kind := self.class_of(right)):
                    self.names[ast.unparse(left)] = kind
        self.generic_visit(node)


def reads_of(path: Path, fields: dict[str, dict[str, str]]) -> set[tuple[str, str]]:
    reads = Reads(fields)
    reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    return reads.found


def used_settings() -> set[str]:
    """Dotted names of the settings that are read outside config.py, directly or by a method of a config."""
    fields = class_fields(FILES)
    found = set().union(*(reads_of(path, fields) for path in FILES if path != CONFIG))
    for node in ast.parse(CONFIG.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                used = isinstance(method, ast.FunctionDef) and (node.name, method.name) in found
                if used and method.name not in NOT_A_USE:
                    reads = Reads(fields)
                    reads.names["self"] = node.name
                    reads.visit(method)
                    found |= reads.found
    groups = {
        kind: f"{group}." for group, kind in fields["Config"].items() if kind.endswith("Config") and kind != "Config"
    }
    return {groups.get(kind, "") + name for kind, name in found if kind in groups or kind == "Config"}


USED = used_settings()


@pytest.mark.parametrize("name", settings())
def test_every_setting_is_read(name):
    assert name in USED


def test_a_name_in_another_group_is_no_use(tmp_path):
    (tmp_path / "a.py").write_text(
        "def f(config: Config, model: ModelConfig):\n"
        "    c, other = config.sample, 3\n"
        "    return c.every_steps + model.config.dropout + other.every_steps + unknown.dropout\n"
    )
    fields = class_fields([CONFIG])
    assert {pair for pair in reads_of(tmp_path / "a.py", fields) if pair[0]} == {
        ("Config", "sample"), ("SampleConfig", "every_steps"), ("ModelConfig", "config")
    }  # fmt: skip


def test_every_corpus_that_a_config_may_name_can_be_opened():
    assert set(OPENERS) == set(config_module.CORPORA)
