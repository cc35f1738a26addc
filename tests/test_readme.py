"""What documents, help texts and error messages tell a user to write exists: scripts, flags, recipes, settings, files.

The worked examples of README.md are executed; everything else is parsed. A paragraph or a row with † may name settings
that were removed, and so may the changelog.
"""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BOS, ROOT, build_config, tiny_batches, tiny_trainer
from readme_blocks import find_blocks

from tale_jax.config import REMOVED, RENAMED, Config, settings
from tale_jax.data.corpus import OPENERS
from tale_jax.data.prepare import prepare
from tale_jax.hardware.backend import Backend
from tale_jax.model import transformer
from tale_jax.training.optimizer import OPTIMIZERS
from tale_jax.training.step import make_trainer

MARKDOWN = sorted(
    path for pattern in ("*.md", "launch/*.md", "configs/*.md", "tale_jax/*/*.md") for path in ROOT.glob(pattern)
)
PYTHON = sorted(path for folder in ("launch", "configs", "tale_jax") for path in (ROOT / folder).rglob("*.py"))


class Text(NamedTuple):
    """Something that a user reads, of one line, and where it stands."""

    place: str
    text: str
    is_code: bool  # to be typed as it is; not prose


def markdown_texts(path: Path) -> Iterator[Text]:
    """Lines of code blocks, spans of code, and paragraphs."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    source = re.sub(r"^```python\n.*?^```$", "", source, flags=re.MULTILINE | re.DOTALL)  # those are executed
    for i, part in enumerate(re.split(r"^```.*$", source, flags=re.MULTILINE)):
        if i % 2:
            lines = part.replace("\\\n", " ").splitlines()
            yield from (Text(name, line.strip().removeprefix("$ "), True) for line in lines)
            continue
        for paragraph in re.split(r"\n\s*\n|\n(?=\|)", part):
            if "†" in paragraph:
                continue
            paragraph = " ".join(paragraph.split())
            yield Text(name, paragraph, False)
            spans = re.findall(r"`([^`]+)`", paragraph)
            yield from (Text(name, span.replace(r"\|", "|"), True) for span in spans)


def python_texts(path: Path) -> Iterator[Text]:
    """The lines of strings, docstrings among them, and of comments; what an f-string fills in is …"""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    strings = [line.partition("# ")[2] for line in source.splitlines()]
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            strings.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    for line in (line for string in strings for line in string.splitlines()):
        yield Text(name, line.strip(), line.strip().startswith("python launch/"))
        yield from (Text(name, span, True) for span in re.findall(r"`([^`]+)`", line))


TEXTS = [text for path in MARKDOWN for text in markdown_texts(path)]
TEXTS += [text for path in PYTHON for text in python_texts(path)]


def script_flags(script: str) -> set[str]:
    """The flags that a launch script defines."""
    flags = {"help", "verbosity"}
    for node in ast.walk(ast.parse((ROOT / "launch" / f"{script}.py").read_text(encoding="utf-8"))):
        function = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        if function.startswith("DEFINE_") or function == "define_path":
            flags.add(str(node.args[0].value))
            if function == "DEFINE_bool":
                flags.add(f"no{node.args[0].value}")
    return flags


SCRIPTS = {
    path.stem: script_flags(path.stem)
    for path in (ROOT / "launch").glob("*.py")
    if path.stem not in ("cli", "command_line")
}
SETTINGS = settings()
GROUPS = {name.rpartition(".")[0] for name in SETTINGS if "." in name}
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def placeholder(value: str) -> bool:
    """Whether a value stands for one that the user chooses: DIR, my-texts/ or …"""
    return not value or "…" in value or re.fullmatch(r"[A-Z_]+", value) is not None


def check_setting(name: str, value: str) -> str:
    """What is wrong with `--config.NAME=VALUE`, "" if nothing."""
    if name not in SETTINGS:
        return "" if name in GROUPS and not value else f"--config.{name} is no setting"
    if placeholder(value):
        return ""
    kind = type(SETTINGS[name].default)
    try:
        if kind is bool:
            assert value.lower() in ("true", "false"), "must be True or False"
        else:
            SETTINGS[name].read(name, kind(value))
    except (ValueError, AssertionError) as error:
        return f"--config.{name}={value}: {error}"
    return ""


def check_recipe(value: str) -> str:
    """What is wrong with the recipe `configs/NAME.py` or `configs/NAME.py:VARIANT`, "" if nothing."""
    stem, _, variant = value.removeprefix("configs/").partition(".py")
    if placeholder(stem) or stem == "X":
        return ""
    if not (ROOT / "configs" / f"{stem}.py").is_file():
        return f"there is no {value}"
    if variant.startswith(":") and not placeholder(variant[1:]):
        try:
            importlib.import_module(f"configs.{stem}").get_config(variant[1:])
        except (ValueError, TypeError) as error:
            return f"{value}: {error}"
    return ""


def check_command(script: str, words: list[str]) -> Iterator[str]:
    """What is wrong with the words after `launch/SCRIPT.py`, up to the first that is no flag."""
    if placeholder(script):
        return
    if script not in SCRIPTS:
        yield f"there is no launch/{script}.py"
        return
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or placeholder(name):
            return
        if name.startswith("config."):
            if "config" not in SCRIPTS[script]:
                yield f"{script}.py has no --config"
            yield check_setting(name.removeprefix("config."), value)
        elif name not in SCRIPTS[script]:
            yield f"{script}.py has no flag --{name}"
        elif name == "config":
            yield check_recipe(value)


def split_words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # an apostrophe of prose, or a quote that the next line closes
        return text.split()


def commands(texts: list[Text]) -> Iterator[tuple[Text, str, list[str]]]:
    """Every script in the texts that is followed by flags, or is to be run: its name, and the words after it."""
    for text in texts:
        for match in re.finditer(r"(python (?:launch/)?|launch/|\b)(\w+)\.py(?=( --)?)", text.text):
            prefix, script, has_flags = match.groups()
            rest = text.text[match.end() :]
            runs = prefix == "python launch/" and (text.is_code or has_flags)
            if text.is_code and runs:
                yield text, script, split_words(rest)
            elif runs or (has_flags and script in SCRIPTS):
                yield text, script, [word.rstrip(".,;:)") for word in split_words(rest.partition("`")[0])]


def test_every_command_names_a_script_its_flags_recipes_and_settings():
    found = list(commands(TEXTS))
    wrong = [f"{t.place}: {fault} in {t.text!r}" for t, *command in found for fault in check_command(*command) if fault]
    assert not wrong, "\n".join(wrong)
    places = {text.place for text, *_ in found}
    assert {"README.md", "launch/README.md", "launch/train.py", "configs/tales.py"} <= places and len(found) > 80


def test_every_recipe_named_anywhere_exists_with_its_variant():
    named = [(t, m) for t in TEXTS for m in re.findall(r"configs/\w+\.py(?::[a-z]\w*)?", t.text)]
    wrong = [f"{text.place}: {fault}" for text, recipe in named if (fault := check_recipe(recipe))]
    assert not wrong, "\n".join(wrong)
    assert len(named) > 40


def test_every_script_named_anywhere_exists():
    named = [(t, m) for t in TEXTS for m in re.findall(r"(?<![\w/])launch/(\w+)\.py", t.text) if not placeholder(m)]
    wrong = [f"{t.place}: there is no launch/{m}.py" for t, m in named if not (ROOT / "launch" / f"{m}.py").is_file()]
    assert not wrong, "\n".join(wrong)


def test_every_setting_named_anywhere_exists():
    """As a flag, or by its dotted name where that is marked as code."""
    flags = [
        (text, name, value)
        for text in TEXTS
        for name, value in re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)*)(?:=([^\s`'\";,)|]*))?", text.text)
    ]
    wrong = [f"{t.place}: {fault}" for t, name, value in flags if (fault := check_setting(name, value.rstrip(".:")))]
    groups = "|".join(sorted(GROUPS | {"average"}))
    files = r"(?:py|json|jsonl|md|html|bin|txt|model|partial|safetensors|gguf)\b"
    named = [
        (text, match)
        for text in TEXTS
        if text.is_code and text.place.endswith(".md")
        for match in re.findall(rf"(?<![\w./])((?:{groups})\.(?!{files})[a-z]\w*)(?![\w(/])", text.text)
    ]
    old = RENAMED.keys() | REMOVED
    wrong += [
        f"{text.place}: {name} is no setting"
        for text, name in named
        if name not in SETTINGS and not (text.place == "CHANGELOG.md" and name in old)
    ]
    assert not wrong, "\n".join(wrong)
    assert len(flags) > 100 and len(named) > 50


def test_every_flag_of_a_remedy_is_a_flag_of_a_script():
    """Error messages and help texts of the package and of the scripts."""
    modules = {name for path in PYTHON for name in re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text())}
    known = set().union(*SCRIPTS.values(), modules)  # and those of what is run as `python -m`
    others = set("xla_cpu_prefer_vector_width xla_gpu_enable_latency_hiding_scheduler".split())  # XLA's
    others |= set("xla_backend_optimization_level xla_llvm_disable_expensive_passes".split())
    others |= set("name helpshort count start ink muted grid".split())  # absl's, of a module, CSS variables
    others |= {"address"}  # of `ray start`
    found = [
        (text, name)
        for text in TEXTS
        if text.place.endswith(".py") and not text.is_code and not text.place.endswith("slurm.py")  # Slurm's own
        for name in re.findall(r"(?<![\w(-])--([a-z][a-z_]+)(?=[=\s,;.)]|$)(?!\.)", text.text)
    ]
    wrong = [f"{text.place}: no script has --{name}: {text.text}" for text, name in found if name not in known | others]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 20


def test_the_settings_of_every_command_go_together():
    """Each setting may be right, and a run with all of them refused all the same."""
    # What a block shows to be a mistake.
    mistakes = [words for block in find_blocks() for words, out in block.steps if out[:1] and "error: " in out[0]]
    wrong, count = [], 0
    for text, _, words in commands([text for text in TEXTS if text.is_code]):
        flags = [word.removeprefix("--").partition("=") for word in words]
        recipe = next((value for name, _, value in flags if name == "config"), "")
        changes = {name.removeprefix("config."): value for name, _, value in flags if name.startswith("config.")}
        skipped = any(words[:1] and text.text.endswith(mistake.partition(".py ")[2]) for mistake in mistakes)
        stem, _, variant = recipe.removeprefix("configs/").partition(".py")
        if (
            not recipe
            or skipped
            or "…" in text.text
            or placeholder(stem)
            or stem == "X"
            or placeholder(variant[1:]) * variant
        ):
            continue
        config = importlib.import_module(f"configs.{stem}").get_config(*filter(None, [variant[1:]]))
        for name, value in changes.items():
            if name in SETTINGS:
                kind = type(SETTINGS[name].default)
                with config.unlocked():
                    config.update_from_flattened_dict({name: value == "True" if kind is bool else kind(value)})
        if stem in ("files", "finetune") and not config.corpus.path:
            continue  # about what is typed beside it
        count += 1
        try:
            Config.build(config, changes).with_total_steps()
        except ValueError as error:
            wrong.append(f"{text.place}: {text.text!r}: {error}")
    assert not wrong, "\n".join(wrong)
    assert count > 40


def test_every_make_target_and_extra_exists():
    found = [(t, target) for t in TEXTS if t.is_code for target in re.findall(r"^make ([a-z][a-z-]*)", t.text)]
    wrong = [f"{text.place}: make {target}" for text, target in found if target not in TARGETS]
    extras = [
        (text, extra)
        for text in TEXTS
        for names in re.findall(r"EXTRAS=([a-z][a-z,-]*)", text.text)
        for extra in filter(None, names.split(","))
    ]
    wrong += [f"{text.place}: EXTRAS={extra}" for text, extra in extras if extra not in EXTRAS]
    assert not wrong, "\n".join(wrong)
    assert {target for _, target in found} >= {"demo", "test"} and extras


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        if "://" in link:
            continue
        if not target.exists() or (
            anchor and anchor not in anchors(target / "README.md" if target.is_dir() else target)
        ):
            wrong.append(link)
    assert not wrong


def test_what_these_tests_are_made_for_is_found():
    """A variant, a flag and a setting that are not there; and what may stand in documents."""
    assert check_recipe("configs/tales.py:small") and check_recipe("configs/tale.py")
    assert not check_recipe("configs/tales.py:tiny") and not check_recipe("configs/NAME.py:VARIANT")
    assert check_setting("model.word_dropout", "0.1") and check_setting("model.num_layers", "0")
    assert not check_setting("corpus.path", "DIR") and not check_setting("model.scan_layers", "True")
    texts = [
        Text("x", "see python launch/sample.py --promt=x", False),
        Text("x", "python launch/serv.py", True),
        Text("x", "evaluate.py --config.seed=1 …", False),
    ]
    faults = [[fault for fault in check_command(*command) if fault] for _, *command in commands(texts)]
    wanted = ["sample.py has no flag --promt", "there is no launch/serv.py", "evaluate.py has no --config"]
    assert faults == [[fault] for fault in wanted]


# The worked examples.


def example(name: str) -> str:
    """The code block of README.md that is marked `<!-- run: NAME -->`."""
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- run: {name} -->\s*```python\n(.*?)```", source, flags=re.DOTALL)
    assert found, f"README.md has no example {name}"
    return found[1]


def test_readme_optimizer(monkeypatch, cpu: Backend):
    """Chosen by its name it trains, and moves every matrix by as much as its learning rate says."""
    monkeypatch.setitem(OPTIMIZERS, "lion", None)  # so that it is gone afterwards
    exec(example("add-optimizer"), {})
    small = {"model.num_layers": 1, "model.embed_dim": 32, "model.num_heads": 2, "model.seq_len": 16, "batch_size": 8}
    small |= {"tokenizer.vocab_size": 64, "tokenizer.path": "none.model", "optimizer.weight_decay": 0.0}
    config = build_config(**small, **{"optimizer.learning_rate": 1e-2}).with_total_steps()
    config = replace(config, optimizer=replace(config.optimizer, name="lion"))
    trainer = make_trainer(config, cpu, jnp.float32, BOS)
    state, losses = trainer.init(), []
    before = jax.device_get(state.params)
    for windows in tiny_batches(1) * 20:
        state, metrics = trainer.step(state, trainer.place(windows))
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:
            kernel = lambda params: np.asarray(params["blocks"]["mlp"]["down"]["kernel"])  # noqa: E731
            rate = float(metrics["learning_rate"])
            np.testing.assert_allclose(np.abs(kernel(state.params) - kernel(before)), 0.2 * rate, rtol=1e-3)
    assert losses[-1] < losses[0] - 0.3


def test_readme_dataset(monkeypatch, tmp_path):
    """Chosen by its name, its documents are prepared, each line in one split."""
    monkeypatch.setitem(OPENERS, "lines", None)
    exec(example("add-dataset"), {})
    lines = [f"This is line {i} of a small file, and it says {'x' * (i % 7)}." for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    config = build_config(**{"tokenizer.vocab_size": 320, "model.seq_len": 16})
    config = replace(config, corpus=replace(config.corpus, name="lines", path=str(tmp_path / "text.txt")))
    prepared = prepare(config, tmp_path / "run")
    counts = {split: manifest.documents for split, manifest in prepared.manifests.items()}
    assert sum(counts.values()) == len(lines) and 5 < counts["valid"] < 50 and 5 < counts["test"] < 50
    assert prepare(config, tmp_path / "run").manifests == prepared.manifests


def test_readme_layer(monkeypatch):
    """In the place of the activation of the MLP it changes what the model computes, and can be trained."""
    monkeypatch.setattr(transformer, "swiglu", transformer.swiglu)
    trainer = tiny_trainer(**{"model.zero_init_outputs": False})
    loss = lambda trainer: float(trainer.step(trainer.init(), trainer.place(tiny_batches(1)[0]))[1]["loss"])  # noqa: E731
    before = loss(trainer)
    exec(example("add-layer"), {})
    after = loss(tiny_trainer(**{"model.zero_init_outputs": False}))
    assert np.isfinite(after) and abs(after - before) > 1e-4


def test_readme_scores_a_text(trained, capsys):
    code = example("score-a-text")
    assert '"experiments/tales"' in code
    exec(code.replace('"experiments/tales"', repr(str(trained))), {})
    found = re.fullmatch(r"(\d+\.\d+) nats/token, (\d+\.\d+) bits/byte\n", capsys.readouterr().out)
    assert found and 1 < float(found[1]) < 8 and 1 < float(found[2]) < 8
