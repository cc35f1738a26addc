"""Every program of every recipe asks the Metal plugins only for what they are known to have."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, build_config

from tale_jax.config import Config
from tale_jax.model import transformer
from tale_jax.planning.plan import zeros
from tale_jax.planning.programs import UntrainedTokenizer, audit, programs
from tale_jax.planning.timing import random_windows
from tale_jax.training.step import make_trainer

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in {"base", "__init__"})
VARIANTS = {"m2_air": ["", "tuned"], "tales": ["", "hour", "tiny"], "wikitext2": ["", "best"]}
DTYPES = {"METAL": "float32", "mps": "bfloat16"}  # what each plugin is expected to run best


def recipe(name: str, *variant: str, **changes) -> Config:
    config = importlib.import_module(f"configs.{name}").get_config(*filter(None, variant))
    config.corpus.path = "text"
    config.update_from_flattened_dict(changes)
    return Config.build(config).with_total_steps(100_000)


@pytest.mark.parametrize("platform", ["METAL", "mps"])
@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in RECIPES for v in VARIANTS.get(n, [""])])
def test_recipes_keep_to_known_operations(cpu, name, variant, platform):
    found = list(audit(recipe(name, variant), cpu, platform, jnp.dtype(DTYPES[platform])))
    assert [program.name for program in found] == ["init", "train", "score", "load", "prefill", "decode"]
    assert not (faults := [fault for program in found for fault in program.faults]), "\n".join(faults)
    for program in found:  # shown by pytest -rP
        total, kinds = sum(program.operations.values()), len(program.operations)
        print(f"{program.name:>8}: {total:5,} operations of {kinds} kinds, {program.num_assumed} assumed")


SETTINGS = [
    {"remat": "block"},
    {"remat": "dots_saveable", "model.scan_layers": True},
    {"micro_batch_size": 2, "model.dropout": 0.1, "model.embedding_dropout": 0.1, "ema.decay": 0.99},
    {"model.num_kv_heads": 1, "model.induction_init": False, "model.tie_embeddings": False},
    {"optimizer.name": "adamw", "schedule.name": "wsd"},
    {"optimizer.normuon_beta": 0.95, "schedule.short_seq_fraction": 0.5},
]


@pytest.mark.parametrize("platform", ["METAL", pytest.param("mps", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s))
def test_settings_keep_to_known_operations(cpu, settings, platform):
    config = recipe("tales", "tiny", **settings)
    faults = [fault for program in audit(config, cpu, platform, jnp.float32) for fault in program.faults]
    assert not faults, "\n".join(faults)


def test_float16_keeps_to_known_operations(cpu):
    config = recipe("tales", "tiny", micro_batch_size=2)
    faults = [fault for program in audit(config, cpu, "mps", jnp.float16) for fault in program.faults]
    assert not faults, "\n".join(faults)


def test_a_fault_names_the_operation_and_our_line(cpu, monkeypatch):
    """A change of ours that no Metal plugin supports is reported with the line that made it."""
    source = (
        "def rms_norm(x, scale, eps):\n    return jax.numpy.cumsum(x, -1) + jax.lax.cbrt(x) * scale.astype(x.dtype)\n"
    )
    space: dict = {"jax": jax}
    exec(compile(source, str(ROOT / "tale_jax" / "model" / "layers.py"), "exec"), space)
    monkeypatch.setattr(transformer, "rms_norm", space["rms_norm"])
    program = next(p for p in audit(recipe("tales", "tiny"), cpu, "METAL", jnp.float32) if p.name == "score")
    assert any("stablehlo.cbrt at tale_jax/model/layers.py:2: is not among" in fault for fault in program.faults)
    assert all("at tale_jax/model/layers.py:2: " in fault for fault in program.faults)  # also what JAX made of a call


def test_programs_run_with_arguments_of_the_shapes_they_name(cpu):
    config = build_config(precision="float32").with_total_steps()
    trainer = make_trainer(config, cpu, jnp.float32, UntrainedTokenizer.bos_id)
    calls = programs(config, trainer)
    assert list(calls) == ["init", "train", "score", "load", "prefill", "decode"]
    state, metrics = calls["train"].function(calls["init"].function(), random_windows(config))
    assert int(state.step) == 1 and jnp.isfinite(metrics["loss"])
    for name in ("score", "load", "prefill", "decode"):
        call = calls[name]
        jax.block_until_ready(call.function(*zeros(call.args), **call.kwargs))
