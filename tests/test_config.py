"""Every setting is declared once, can be set from a flag, is checked, and refused in one line that helps."""

import ast
import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from typing import Any

import ml_collections
import pytest
from helpers import ROOT, build_config
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from tale_jax import config as config_module
from tale_jax.config import (
    FORMAT,
    REMOVED,
    RENAMED,
    UNKNOWN_TOTAL_STEPS,
    Config,
    advice,
    change,
    leaves,
    nearest_divisor,
    read_config_json,
    settings,
)
from tale_jax.utils.manifests import digest_of

SETTINGS = settings()


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict:
    values = {}
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def build(**changes: Any) -> Config:
    """The defaults with `changes` by dotted name, whatever their types."""
    values = dataclasses.asdict(Config())
    for name, value in changes.items():
        *groups, last = name.split(".")
        place = values
        for part in groups:
            place = place[part]
        place[last] = value
    return Config.build(values)


def refusal(**changes: Any) -> str:
    """The one line with which the defaults with `changes` are refused."""
    with pytest.raises(ValueError, match=" must ") as error:
        build(**changes)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def suggested(line: str, name: str) -> dict[str, Any]:
    """The setting that the remedy of an error about `name` tells to make, by dotted name."""
    remedy = line.rpartition("; ")[2]
    found = re.match(
        r"(?:try |set |did you mean )(?:--config\.)?(?:([a-z_]+(?:\.[a-z0-9_]+)?)=)?(\"[^\"]*\"|[^ ,?]+)", remedy
    )
    assert found, line
    target, text = found[1] or name, found[2]
    kind = type(SETTINGS[target].default)
    return {target: text.strip('"') if kind is str else ast.literal_eval(text)}


# One declaration.


def test_the_base_recipe_has_every_setting_at_its_default():
    assert flat(base.get_config()) == {name: known.default for name, known in SETTINGS.items()}
    assert list(leaves(Config())) == [(name, known.default) for name, known in SETTINGS.items()]
    assert Config.build(base.get_config()) == Config.build(dataclasses.asdict(Config()))


def test_a_default_is_of_its_declared_type_and_every_setting_says_what_it_is():
    groups = [Config, *(type(getattr(Config(), field.name)) for field in dataclasses.fields(Config))]
    for kind in filter(dataclasses.is_dataclass, groups):
        for field in dataclasses.fields(kind):
            if known := field.metadata.get("setting"):
                assert type(known.default) is field.type, field.name
                assert known.doc and "\n" not in known.help
    assert SETTINGS["evaluate.max_windows"].help == "windows of the valid split to score; 0: all"
    assert SETTINGS["metrics.wandb"].help == "record with Weights & Biases: off, offline, online"
    assert SETTINGS["sample.prompt"].help == 'how each sample begins; "": start of a document'


OTHER = {
    "batch_size": 12,
    "micro_batch_size": 4,
    "corpus.name": "files",
    "corpus.encoding": "cp1252",
    "corpus.changed": "continue",
    "model.num_kv_heads": 2,
    "model.embed_dim": 768,
    "model.num_heads": 12,
    "model.seq_len": 512,
    "schedule.seq_len_divisor": 4,
    "model.head_dim": 2,
    "optimizer.name": "muon",
    "lora.matrices": "query,value",
}


def other(name: str, value: Any) -> Any:
    """A legal value that differs from `value`."""
    if name in OTHER:
        return OTHER[name]
    if SETTINGS[name].choices:
        return SETTINGS[name].choices[-1] if SETTINGS[name].choices[-1] != value else SETTINGS[name].choices[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 0.25
    return f"{value}x" if isinstance(value, str) else value + 1


def test_every_leaf_can_be_set_from_a_flag(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import dataclasses, json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from absl import app\nfrom ml_collections import config_flags\n"
        "CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)\n"
        "from tale_jax.config import Config\n"
        "app.run(lambda _: print(json.dumps(dataclasses.asdict(Config.build(CONFIG.value)))))\n"
    )
    wanted = {name: other(name, value) for name, value in flat(base.get_config()).items()}
    flags = [f"--config.{name}={value}" for name, value in wanted.items()]
    done = subprocess.run(
        [sys.executable, str(probe), f"--config={ROOT}/configs/base.py", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = dict(leaves(Config.build(json.loads(done.stdout))))
    assert {name: built[name] for name in wanted} == wanted


# Rules of one setting.

TRIED = (-1, 0, 1 << 22, 1 << 31, 1 << 63, 10**400, -1.0, 0.0, 1.0, 1.5, math.inf, -math.inf, math.nan)
BREAKING = [
    (name, value)
    for name, known in SETTINGS.items()
    for value in TRIED
    if type(value) is type(known.default) and not all(rule.holds(value) for rule in known.rules)
]


@pytest.mark.parametrize(("name", "value"), BREAKING, ids=lambda x: str(x)[:20])
def test_a_broken_rule_is_one_line_whose_remedy_works(name, value):
    line = refusal(**{name: value})
    assert line.startswith(f"{name}={value}"[:60]) and " must " in line
    build(**suggested(line, name))


def test_every_number_has_a_rule_and_every_rule_is_broken_by_something():
    numbers = {name for name, known in SETTINGS.items() if type(known.default) in (int, float)}
    assert {name for name in numbers if not SETTINGS[name].rules} == {"passes"}  # its rule is one with total_steps
    for name in numbers - {"passes"}:
        for rule in SETTINGS[name].rules:
            assert any(not rule.holds(value) for key, value in BREAKING if key == name), (name, rule.text)


@pytest.mark.parametrize("name", [name for name, known in SETTINGS.items() if type(known.default) is not bool])
def test_absurd_values_are_refused_at_once(name):
    kind = type(SETTINGS[name].default)
    for value in {int: [1 << 70, -(1 << 70), 10**400], float: [math.nan, math.inf, -math.inf]}.get(kind, []):
        assert f"{name}={value}"[:50] in refusal(**{name: value})
    if SETTINGS[name].choices:
        assert f'{name}="{"x" * 50}' in refusal(**{name: "x" * 1_000_000})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_value_of_another_type_is_refused_and_the_remedy_works(name):
    kind = type(SETTINGS[name].default)
    for value in ("a\nb", True, 1, 0.5, None, [1], {"a": 1}, b"x"):
        if type(value) is kind or (kind is float and type(value) is int):
            continue
        line = refusal(**{name: value})
        assert line.startswith(f"{name}=") and f"must be of type {kind.__name__}; try" in line
        build(**suggested(line, name))


@pytest.mark.parametrize("name", [name for name, known in SETTINGS.items() if known.choices])
def test_a_misspelled_choice_gets_the_nearest(name):
    choice = SETTINGS[name].choices[-1]
    line = refusal(**{name: choice[:-1]})
    assert line.endswith(f"; did you mean {choice}?")
    assert f'{name}="{choice[:-1]}" must be one of {", ".join(SETTINGS[name].choices)}' in line
    line = refusal(**{name: "zzzz"})
    assert line.endswith(f"; try {SETTINGS[name].choices[0]}")


# Rules between settings.


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model.embed_dim": 100, "model.num_heads": 12},
            "model.embed_dim=100 must be divisible by model.num_heads=12; try 96",
        ),
        (
            {"model.embed_dim": 90, "model.num_heads": 6},
            "model.embed_dim=90 must give heads of an even width (it is 15) for rotary positions; try 96",
        ),
        ({"model.embed_dim": 65535, "model.num_heads": 1000}, "try 64000"),
        ({"model.embed_dim": 1, "model.num_heads": 1024}, "try 2048"),
        (
            {"model.num_heads": 6, "model.embed_dim": 96, "model.num_kv_heads": 4},
            "model.num_kv_heads=4 must divide model.num_heads=6; try 3",
        ),
        ({"model.num_kv_heads": 10**15}, "model.num_heads=6; try 6"),
        ({"model.head_dim": 3}, "model.head_dim=3 must be even for rotary positions; try 4"),
        (
            {"model.induction_match": True},
            "model.induction_match=True must be False without model.induction_init; set "
            "--config.model.induction_init=True",
        ),
        (
            {"model.induction_init": True, "model.num_kv_heads": 1},
            "model.induction_init=True must be False unless another key/value head is left for the rest; set "
            "--config.model.num_kv_heads=0",
        ),
        ({"model.induction_init": True, "model.num_heads": 1}, "for the rest; set --config.model.num_heads=2"),
        (
            {"model.induction_init": True, "model.num_heads": 1, "model.num_kv_heads": 1},
            "for the rest; set --config.model.num_heads=2",
        ),
        ({"model.induction_init": True, "model.num_heads": 1, "model.embed_dim": 6}, "set --config.model.num_heads=2"),
        ({"lora.matrices": "query,valu"}, "each once; did you mean value?"),
        ({"lora.matrices": "query,query"}, "each once; try --config.lora.matrices=query,value"),
        ({"lora.dora": True}, "lora.dora=True must be False where lora.rank=0; set --config.lora.rank=8"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 must divide batch_size=8; try 2"),
        ({"batch_size": 1 << 20, "micro_batch_size": 10**15}, "must divide batch_size=1048576; try 1048576"),
        (
            {"optimizer.normuon_beta": 0.95},
            "optimizer.normuon_beta=0.95 must be 0 where optimizer.name=adamw; set "
            "--config.optimizer.normuon_beta=0, or --config.optimizer.name=muon",
        ),
        (
            {"schedule.short_seq_fraction": 0.5, "schedule.seq_len_divisor": 3, "model.seq_len": 208},
            "schedule.seq_len_divisor=3 must divide model.seq_len=208; try 2",
        ),
        ({"schedule.short_seq_fraction": 0.5, "model.seq_len": 1}, "must divide model.seq_len=1; try 1"),
        ({"schedule.short_seq_fraction": 0.5, "model.seq_len": 1048573}, "must divide model.seq_len=1048573; try"),
        (
            {"corpus.name": "files"},
            'corpus.path="" must name a file, folder or glob; try --config.corpus.path=my-texts/',
        ),
        ({"corpus.name": "hub"}, 'corpus.hub_name="" must name a dataset when corpus.name=hub; try ag_news'),
        ({"corpus.name": "hub", "corpus.hub_name": "x", "corpus.train_split": ""}, "name a split of the dataset; try"),
        ({"tokenizer.vocab_size": 260}, "tokenizer.vocab_size=260 must be at least 261"),
        ({"corpus.encoding": "uft-16"}, 'corpus.encoding="uft-16" must be a text encoding that Python knows; did you'),
        ({"corpus.encoding": "rot13"}, 'corpus.encoding="rot13" must be a text encoding that Python knows; try cp1252'),
        (
            {"corpus.changed": "yes"},
            'corpus.changed="yes" must be "" or continue; try --config.corpus.changed=continue',
        ),
        ({"sample.prompt": " \n"}, 'must hold more than white space; set --config.sample.prompt="" to start documents'),
        ({"sample.prompt": "x\ud800"}, "must be text (half a surrogate pair is none); set --config.sample.prompt"),
        (
            {"total_steps": 5, "schedule.warmup_steps": 6},
            "schedule.warmup_steps=6 must not exceed total_steps=5; try "
            "--config.schedule.warmup_steps=0 (2 % of the run)",
        ),
        (
            {"passes": 0.0},
            "passes=0.0 must be positive when total_steps=0; try --config.passes=1.0, or set --config.total_steps=1000",
        ),
    ],
)
def test_a_broken_rule_between_settings_is_one_line_and_following_it_helps(changes, line):
    changes = dict(changes)
    found = refusal(**changes)
    assert line in found and " must " in found
    for _ in range(3):  # what one remedy changes may need another
        changes |= suggested(found, found.partition("=")[0])
        try:
            build(**changes)
            return
        except ValueError as error:
            found = str(error)
    pytest.fail(f"still refused: {found}")


def test_a_rule_between_settings_holds_only_where_it_is_meant():
    build(**{"tokenizer.vocab_size": 30, "tokenizer.path": "some.model"})
    build(passes=-1.0, total_steps=5)
    build(**{"schedule.seq_len_divisor": 3})
    build(**{"optimizer.normuon_beta": 0.95, "optimizer.name": "muon"})
    build(**{"corpus.name": "hub", "corpus.hub_name": "ag_news"})
    build(**{"model.induction_init": True, "model.induction_match": True})


@given(st.integers(1, 3000), st.integers(1, 10**9), st.integers(1, 2))
def test_nearest_divisor_is_the_nearest(number, wanted, least):
    least = min(least, number)
    divisors = [d for d in range(least, number + 1) if number % d == 0]
    assert nearest_divisor(number, wanted, least) == min(divisors, key=lambda d: abs(d - wanted))


def test_what_is_0_is_derived():
    config = build(**{"model.embed_dim": 192, "model.num_heads": 4, "batch_size": 6, "evaluate.every_steps": 7})
    assert (config.model.num_kv_heads, config.model.mlp_dim, config.model.head_dim) == (4, 512, 48)
    assert (config.micro_batch_size, config.evaluate.batch_size, config.sample.every_steps) == (6, 6, 7)
    config = build(**{"batch_size": 6, "micro_batch_size": 2, "model.num_kv_heads": 2, "model.mlp_dim": 5})
    assert (config.num_micro_batches, config.tokens_per_step, config.evaluate.batch_size) == (3, 6 * 256, 2)
    assert (config.model.num_kv_heads, config.model.mlp_dim) == (2, 5)


# Names.


def test_an_unknown_or_missing_key_is_refused():
    values = dataclasses.asdict(build_config())
    with pytest.raises(ValueError, match=r"model\.num_head is not a setting .* did you mean model\.num_heads"):
        Config.build(values | {"model": values["model"] | {"num_head": 3}})
    with pytest.raises(ValueError, match="seed is missing"):
        Config.build({k: v for k, v in values.items() if k != "seed"})
    with pytest.raises(ValueError, match=r"model\.dropout is missing"):
        Config.build(values | {"model": {k: v for k, v in values["model"].items() if k != "dropout"}})
    with pytest.raises(ValueError, match="model=3 must be a group of settings"):
        Config.build(values | {"model": 3})
    with pytest.raises(ValueError, match=r"did you mean model\.embed_dim\?"):
        Config.build(values | {"embed_dim": 3})
    with pytest.raises(ValueError, match="1 is not a setting"):
        Config.build(values | {1: 2})


@pytest.mark.parametrize("old", [*RENAMED, *sorted(REMOVED)])
def test_an_old_name_is_told_its_new_one(old):
    group, _, last = old.rpartition(".")
    values: Any = dataclasses.asdict(Config())
    if group in values:
        values[group][last] = 0.0
    else:
        values["average"] = {"decay": 0.0}
        old = "average"
    with pytest.raises(ValueError, match="is not a setting of tale_jax") as error:
        Config.build(values)
    assert str(error.value) == f"{old} is not a setting of tale_jax; {advice(old)}"
    assert advice(old) in (f"it is now {RENAMED.get(old)}", "it was removed; leave it out")
    assert old not in SETTINGS and (old in REMOVED or RENAMED[old] in {*SETTINGS, "ema"})


def test_advice_finds_what_was_meant():
    assert advice("sed") == "did you mean seed?"
    assert advice("modl.embed_dim", "--config.") == "did you mean --config.model.embed_dim?"
    assert advice("checkpint.every_steps") == "did you mean checkpoint.every_steps?"
    assert advice("average.decay", "--config.") == "it is now --config.ema.decay"
    assert advice("model.zzzz").startswith("model has num_layers, ")
    assert advice("\n" * 10_000).isprintable()
    for name in ("modl.embed_dim", "zzzz"):
        with pytest.raises(
            ValueError, match=rf"{name} is not a setting of tale_jax; {re.escape(advice(name))}"
        ) as caught:
            Config.build(dataclasses.asdict(Config()) | {name: 3})
    assert str(caught.value).endswith("see `settings` in tale_jax/config.py") and settings()["model.embed_dim"].help
    build(**{"model.embed_dim": 96})


@given(st.sampled_from(list(SETTINGS)), st.integers(0, 40), st.sampled_from(["", "x", "_", "."]))
def test_names_that_are_advised_are_settings(name, place, letter):
    """A letter left out, or another one in its place: whatever the advice names can be set."""
    place %= len(name)
    broken = name[:place] + letter + name[place + 1 :]
    values: Any = dataclasses.asdict(Config()) | {broken: 0}
    if broken in SETTINGS or broken in values:
        return
    with pytest.raises(ValueError, match=r"is not a setting of tale_jax; ") as caught:
        Config.build(values)
    told = str(caught.value).rpartition("; ")[2]
    if meant := re.fullmatch(r"(?:did you mean|it is now) (\S+?)(?: or (\S+?))?\??", told):
        assert all(each in SETTINGS or each == "ema" for each in meant.groups() if each), told
    elif inside := re.fullmatch(r"(\w+) has (.*)", told):
        assert all(f"{inside[1]}.{each}" in SETTINGS for each in inside[2].split(", "))
    else:
        assert told in ("it was removed; leave it out", "leave it out", "see `settings` in tale_jax/config.py"), told
        assert (ROOT / "tale_jax" / "config.py").is_file()


# What depends on the length of the run, and what makes another experiment.


def test_total_steps_covers_the_passes():
    config = build_config(total_steps=0, passes=2.0, batch_size=4).with_total_steps(num_windows=103)
    assert config.total_steps == 51 and config.schedule.warmup_steps == 2 and config.length_known
    with pytest.raises(ValueError, match=r"schedule.warmup_steps=30 must not exceed total_steps=20; try .*=0 "):
        build_config(**{"schedule.warmup_steps": 30})
    by_passes = {"total_steps": 0, "batch_size": 4}  # the length is known when the text is
    with pytest.raises(ValueError, match=r"schedule.warmup_steps=30 must not exceed total_steps=20; try .*=0 "):
        build_config(**by_passes, **{"schedule.warmup_steps": 30}).with_total_steps(80)
    assert build_config(**by_passes, **{"schedule.warmup_steps": 0}).with_total_steps(80).schedule.warmup_steps == 1
    assert build_config(total_steps=0, passes=0.1).with_total_steps(1).total_steps == 1
    given = build_config(total_steps=30, **{"schedule.warmup_steps": 3}).with_total_steps(5)
    assert (given.total_steps, given.schedule.warmup_steps) == (30, 3)


def test_a_run_of_unknown_length_is_endless():
    config = build_config(total_steps=0)
    assert not config.length_known
    endless = config.with_total_steps()
    assert endless.total_steps == UNKNOWN_TOTAL_STEPS and not endless.length_known
    assert endless.schedule.warmup_steps == math.ceil(0.02 * UNKNOWN_TOTAL_STEPS)
    assert Config.build(dataclasses.asdict(endless)) == endless
    assert build_config(total_steps=50).with_total_steps().total_steps == 50
    assert build_config(total_steps=0, passes=1e308).with_total_steps(1 << 40).total_steps == UNKNOWN_TOTAL_STEPS


FREE = {
    "corpus.changed",
    "total_steps",
    "passes",
    "micro_batch_size",
    "on_spike",
    "remat",
    "model.scan_layers",
    "optimizer.learning_rate",
}
FREE_GROUPS = {"evaluate", "sample", "checkpoint", "metrics", "mesh", "backend"}


def test_what_may_change_when_a_run_goes_on():
    free = {name for name, known in SETTINGS.items() if known.free}
    assert free == FREE | {name for name in SETTINGS if name.partition(".")[0] in FREE_GROUPS}


@pytest.mark.parametrize("name", SETTINGS)
def test_only_settings_that_change_what_is_learned_make_another_experiment(name):
    before, after = Config(), copy.deepcopy(dataclasses.asdict(Config()))
    *groups, last = name.split(".")
    place = after[groups[0]] if groups else after
    place[last] = other(name, SETTINGS[name].default)
    rebuilt = Config(
        **{
            field.name: field.type(**after[field.name]) if isinstance(after[field.name], dict) else after[field.name]
            for field in dataclasses.fields(Config)
        }
    )
    found = rebuilt.difference(before)
    assert found == (None if SETTINGS[name].free else (name, place[last], SETTINGS[name].default))


def test_warmup_that_follows_from_the_length_is_no_difference():
    known = build_config().with_total_steps(100)
    assert build_config().difference(known) is None
    assert build_config(**{"schedule.warmup_steps": 2}).difference(known) == ("schedule.warmup_steps", 2, 1)
    chosen = build_config(**{"schedule.warmup_steps": 5}).with_total_steps(100)
    assert build_config().difference(chosen) == ("schedule.warmup_steps", 0, 5)


def test_change_makes_a_built_config_with_other_settings():
    config = change(build_config(), {"model.num_layers": 3, "micro_batch_size": 2})
    assert (config.model.num_layers, config.micro_batch_size, config.evaluate.batch_size) == (3, 2, 2)
    with pytest.raises(ValueError, match="micro_batch_size=3 must divide batch_size=4"):
        change(build_config(), {"micro_batch_size": 3})


# config.json.


def test_saved_and_loaded_config_is_the_same(tmp_path):
    config = build_config(**{"sample.prompt": "Не\n", "metrics.wandb_project": "Не\n\ud800"})
    config.save(tmp_path)
    assert Config.load(tmp_path) == config
    assert (tmp_path / "config.json").read_text().startswith(f'{{\n  "format": {FORMAT},\n  "seed": 0,\n')
    assert read_config_json(tmp_path) == dataclasses.asdict(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="must hold an experiment"):
        Config.load(tmp_path / "nowhere")


def test_a_workdir_from_before_format_1_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(build_config()) | {"average": {"decay": 0.0}}))
    with pytest.raises(ValueError, match=r"older tale_jax \(before format 1\); train again in a new workdir, or use"):
        Config.load(tmp_path)


@pytest.mark.parametrize("number", [FORMAT + 1, 10**400, 0, -1, "1", True, None, 1.0, [1]])
def test_a_format_that_is_not_known_is_refused_with_what_to_do(tmp_path, number):
    (tmp_path / "config.json").write_text(json.dumps({"format": number} | dataclasses.asdict(build_config())))
    with pytest.raises(
        ValueError, match=rf"format=.* must be a number from 1 to {FORMAT}; update tale_jax .* restore"
    ) as error:
        Config.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def write_with_digest(workdir, values):
    (workdir / "config.json").write_text(json.dumps(values | {"digest": digest_of(values)}))


@pytest.mark.parametrize("change", ["value", "digest", "no digest"])
def test_a_config_json_that_was_changed_since_is_refused(tmp_path, change):
    build_config().save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if change == "no digest":
        del saved["digest"]
    else:
        saved |= {"seed": 1} if change == "value" else {"digest": "0" * 64}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"config\.json is damaged, or was changed by hand; restore it .*--repair"):
        Config.load(tmp_path)


def test_a_config_json_that_is_too_long_or_leads_elsewhere_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text("[" + " " * (1 << 20) + "]")
    with pytest.raises(ValueError, match=r"config\.json must have at most 1,048,576 bytes"):
        Config.load(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"is a link to another place"):
        Config.load(tmp_path / "run")


def test_an_older_format_is_brought_to_the_present_one(tmp_path, monkeypatch):
    config = build_config()
    config.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["digest"]
    saved["sid"] = saved.pop("seed")
    write_with_digest(tmp_path, saved)
    monkeypatch.setattr(config_module, "FORMAT", FORMAT + 1)
    upgrade = lambda values: {("seed" if k == "sid" else k): v for k, v in values.items()}  # noqa: E731
    monkeypatch.setitem(config_module.UPGRADES, FORMAT, upgrade)
    assert Config.load(tmp_path) == config


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_an_older_format_had_fewer_settings(tmp_path, number):
    values = {"format": number} | dataclasses.asdict(build_config())
    for later in range(number + 1, FORMAT + 1):
        for name, new in config_module.NEW_SETTINGS[later].items():
            for setting in new if isinstance(new, dict) else ():
                del values[name][setting]
            if not isinstance(new, dict) or not values[name]:
                del values[name]
    if number >= config_module.FIRST_WITH_DIGEST:
        values["digest"] = digest_of(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Config.load(tmp_path) == build_config()


def test_format_2_had_no_on_spike(tmp_path):
    values = {"format": 2} | dataclasses.asdict(build_config())
    del values["on_spike"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Config.load(tmp_path) == build_config()


def test_what_a_run_may_go_on_with_is_told_with_both_values():
    before = build_config()
    after = change(before, {"optimizer.learning_rate": 1e-4, "remat": "block"})
    assert before.difference(after) is None
    assert after.changes(before) == {
        "remat": ["none", "block"],
        "optimizer.learning_rate": [before.optimizer.learning_rate, 1e-4],
    }
    assert Config.from_json(json.loads(json.dumps(after.to_json()))) == after


def test_every_format_from_1_on_has_an_upgrade():
    assert set(config_module.UPGRADES) == set(range(1, FORMAT))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b"{",
        b"\xff\xfe\x00",
        b"\x80abc",
        b'{"format": 1}',
        b"[" * 100_000,
        b'{"format": 1, "a": ' * 50_000,
        b'{"format": 1, "model": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"format": 1, "seed": ' + b"9" * 5000 + b"}",
        b'{"format": 1, "a\\nb\\u2028": 1}',
        b'{"format": 1, "\\ud800": 1}',
    ],
    ids=range(14),
)
def test_a_damaged_config_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        Config.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    str(error.value).encode()


def loads_or_is_refused(folder, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    try:
        config = Config.load(folder)
    except ValueError as error:
        line = str(error)
    else:
        assert Config.build(dataclasses.asdict(config)) == config
        return
    line.encode()
    assert len(line.splitlines()) == 1, line


@given(content=st.binary(max_size=200))
def test_bytes_are_loaded_or_refused(tmp_path_factory, content):
    loads_or_is_refused(tmp_path_factory.getbasetemp(), content)


NUMBERS = st.one_of(
    st.integers(), st.integers(-3, 3000), st.floats(), st.sampled_from([1 << 20, (1 << 20) - 3, 10**400, 1 << 31])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(st.sampled_from([*SETTINGS, *{name.partition(".")[0] for name in SETTINGS}]), JSON),
    extra=st.dictionaries(st.text(max_size=10), JSON, max_size=1),
)
def test_values_are_loaded_or_refused(tmp_path_factory, changes, extra):
    values: Any = {"format": FORMAT} | dataclasses.asdict(Config()) | extra
    for name, value in changes.items():
        first, _, last = name.partition(".")
        if last and isinstance(values[first], dict):
            values[first][last] = value
        elif not last:
            values[first] = value
    loads_or_is_refused(tmp_path_factory.getbasetemp(), json.dumps(values).encode())


# Each number by itself, of its own type: they get past the types to the rules between settings.
TYPES = {
    int: st.one_of(st.integers(0, 64), st.integers(), NUMBERS.filter(lambda x: type(x) is int)),
    float: st.floats(),
}


@given(
    changes=st.fixed_dictionaries(
        {},
        optional={name: TYPES[type(known.default)] for name, known in SETTINGS.items() if type(known.default) in TYPES},
    ),
    flags=st.fixed_dictionaries(
        {}, optional={name: st.booleans() for name, known in SETTINGS.items() if type(known.default) is bool}
    ),
)
def test_numbers_are_built_or_refused_until_remedies_are_followed(changes, flags):
    changes |= flags
    for _ in range(2 * len(SETTINGS)):
        try:
            build(**changes)
            return
        except ValueError as error:
            line = str(error)
            assert len(line.splitlines()) == 1 and " must " in line
        changes |= suggested(line, line.partition("=")[0])
    pytest.fail(f"remedies lead nowhere: {line}")


def test_words_of_other_programs_lead_to_settings():
    from tale_jax.config import COMMON_NAMES, advice, setting_meant_by, settings

    assert set(COMMON_NAMES.values()) <= set(settings())
    assert advice("optimizer.lr", "--config.") == "did you mean --config.optimizer.learning_rate?"
    for name, meant in {"model.n-layer": "model.num_layers", "block_size": "model.seq_len", "bs": "batch_size"}.items():
        assert setting_meant_by(name) == meant
