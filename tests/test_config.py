"""Every setting is declared once, can be set from a flag, is checked, and refused in one line that helps."""

import dataclasses
import json
import subprocess
import sys

import ml_collections
import pytest
from conftest import ROOT, build_config

from configs import base
from tale_jax.config import Config, leaves


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict:
    values = {}
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def test_declared_keys_and_dataclass_fields_are_the_same():
    assert set(flat(base.get_config())) == {name for name, _ in leaves(Config.build(base.get_config()))}


OTHER = {
    "batch_size": 12,
    "micro_batch_size": 4,
    "precision": "float32",
    "remat": "block",
    "corpus.name": "files",
    "schedule.name": "cosine",
    "windows": "document",
    "optimizer.name": "muon",
    "metrics.wandb": "offline",
    "backend.platform": "cpu",
    "model.num_kv_heads": 2,
    "model.embed_dim": 768,
    "model.num_heads": 12,
    "corpus.held_out": 0.1,
    "model.dropout": 0.5,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.momentum": 0.9,
    "optimizer.decay_schedule": "constant",
    "schedule.short_cut": 4,
    "schedule.small_divisor": 3,
    "model.seq_len": 512,
    "schedule.decay_fraction": 0.5,
}


def other(name: str, value):
    """A legal value that differs from `value`."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value + 0.25


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
    built = dict(leaves(Config.build(__import__("json").loads(done.stdout))))
    assert {name: built[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model.embed_dim": 100, "model.num_heads": 12},
            "model.embed_dim=100 must be divisible by model.num_heads=12; try 96",
        ),
        (
            {"model.num_heads": 6, "model.embed_dim": 96, "model.num_kv_heads": 4},
            "model.num_kv_heads=4 must divide model.num_heads=6; try 3",
        ),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 must divide batch_size=8; try 2"),
        ({"remat": "blok"}, "did you mean block?"),
        ({"precision": "fp16"}, 'precision="fp16" must be one of auto, float32, bfloat16'),
        ({"model.dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        ({"average.decay": 1.0}, "average.decay=1.0 must be at least 0 and below 1; try 0.999"),
        ({"optimizer.name": "lyon"}, "must be one of adamw, muon, lion; did you mean lion?"),
        (
            {"optimizer.name": "lion", "optimizer.neuron_beta": 0.95},
            "optimizer.neuron_beta=0.95 must be 0 where optimizer.name=lion; set optimizer.name=muon",
        ),
        (
            {"optimizer.name": "adamw", "optimizer.momentum_warmup_steps": 5},
            "optimizer.momentum_warmup_steps=5 must be 0 where optimizer.name=adamw; set optimizer.name=muon",
        ),
        (
            {"schedule.short_fraction": 0.5, "schedule.short_cut": 3},
            "schedule.short_cut=3 must divide model.seq_len=208; try 2",
        ),
        (
            {"schedule.small_fraction": 0.5, "schedule.small_divisor": 3},
            "schedule.small_divisor=3 must divide batch_size=4 into parts of whole micro-batches (of 4) or of",
        ),
        ({"minutes": -1.0}, "minutes=-1.0 must not be negative; 0 is off"),
        ({"schedule.small_fraction": 1.5}, "schedule.small_fraction=1.5 must be at most 1"),
        ({"corpus.name": "files"}, 'corpus.path="" must name a file, folder or glob'),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan must be positive"),
        ({"total_steps": 0, "passes": 0.0}, "passes=0.0 must be positive when total_steps=0"),
    ],
)
def test_a_broken_rule_is_one_line_with_field_value_rule_and_remedy(changes, line):
    with pytest.raises(ValueError, match="must") as error:
        build_config(**changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_or_missing_key_is_refused():
    values = dataclasses.asdict(build_config())
    with pytest.raises(ValueError, match=r"model\.num_head is not a setting .* did you mean model\.num_heads"):
        Config.build(values | {"model": values["model"] | {"num_head": 3}})
    with pytest.raises(ValueError, match="seed is missing"):
        Config.build({k: v for k, v in values.items() if k != "seed"})
    with pytest.raises(ValueError, match="seed='a' must be of type int"):
        Config.build(values | {"seed": "a"})


def test_saved_and_loaded_config_is_the_same(tmp_path):
    config = build_config()
    config.save(tmp_path)
    assert Config.load(tmp_path) == config
    with pytest.raises(ValueError, match="must hold an experiment"):
        Config.load(tmp_path / "nowhere")


def test_only_settings_that_change_what_is_learned_make_another_experiment():
    config = build_config()
    same = {"total_steps": 99, "remat": "block", "model.scan_layers": True, "checkpoint.keep": 9, "micro_batch_size": 2}
    assert config.difference(build_config(**same)) is None
    assert config.difference(build_config(**{"model.num_layers": 3})) == ("model.num_layers", 2, 3)


def test_planned_run_covers_the_passes():
    config = build_config(total_steps=0, passes=2.0, batch_size=4).planned(num_windows=103)
    assert config.total_steps == 51 and config.schedule.warmup_steps == 2
    with pytest.raises(ValueError, match=r"schedule.warmup_steps=30 must not exceed total_steps=20"):
        build_config(**{"schedule.warmup_steps": 30}).planned(1000)


def test_a_workdir_saved_before_a_setting_was_there_still_loads(tmp_path):
    config = build_config()
    config.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model"].pop("induction_init") is True
    for name in ("memory_gb", "ignore_memory"):
        saved["backend"].pop(name)
    saved.pop("average")
    for name in ("momentum", "cautious", "embedding_decay", "decay_schedule", "momentum_warmup_steps", "neuron_beta"):
        saved["optimizer"].pop(name)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = Config.load(tmp_path)
    assert loaded.model == dataclasses.replace(config.model, induction_init=False)
    assert loaded.optimizer == config.optimizer and loaded.average == config.average
