"""Every program of every recipe asks the Metal plugins only for what they are known to have."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from tale_jax.config import Config
from tale_jax.hardware.stablehlo import inspect, known_operations
from tale_jax.planning.programs import audit

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")
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
        print(f"{program.name:>8}: {total:5,} operations of {kinds} kinds, {program.believed} believed")


SETTINGS = [
    {"remat": "block"},
    {"remat": "dots_saveable", "model.scan_layers": True},
    {"micro_batch_size": 2, "model.dropout": 0.1, "model.embedding_dropout": 0.1, "ema.decay": 0.99},
    {
        "model.num_kv_heads": 1,
        "model.induction_init": False,
        "model.induction_match": False,
        "model.logit_softcap": 15.0,
        "model.tie_embeddings": False,
    },
    {"optimizer.name": "adamw", "schedule.name": "wsd"},
    {"optimizer.name": "lion", "optimizer.cautious": True, "optimizer.embedding_decay": 0.1},
    {
        "optimizer.normuon_beta": 0.95,
        "optimizer.momentum_warmup_steps": 9,
        "optimizer.decay_schedule": "constant",
        "schedule.short_seq_fraction": 0.5,
    },
]


@pytest.mark.parametrize("platform", ["METAL", "mps"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s))
def test_settings_keep_to_known_operations(cpu, settings, platform):
    config = recipe("tales", "tiny", **settings)
    faults = [fault for program in audit(config, cpu, platform, jnp.float32) for fault in program.faults]
    assert not faults, "\n".join(faults)


def test_float16_keeps_to_known_operations(cpu):
    config = recipe("tales", "tiny", micro_batch_size=2)
    faults = [fault for program in audit(config, cpu, "mps", jnp.float16) for fault in program.faults]
    assert not faults, "\n".join(faults)


def lowered(function, *args, platform="METAL"):
    return function.trace(*args).lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")


@pytest.mark.parametrize(
    ("function", "shapes", "fault"),
    [
        (lambda x: jnp.linalg.cholesky(x), [(4, 4)], "is not among the operations that the plugin names"),
        (lambda x, y: jnp.einsum("bij,bijk->bk", x, y), [(2, 3, 4), (2, 3, 4, 5)], "contracts more than one dimension"),
        (lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2,), (1,), "VALID"), [(8,)], "only known to work for"),
        (lambda x: x * (1 + 1j), [(3,)], "has a 64-bit tensor, tensor<3xcomplex<f32>>"),
    ],
    ids=["operation", "batched dot", "window", "complex"],
)
def test_what_a_plugin_lacks_is_found(function, shapes, fault):
    program = inspect("demo", lowered(jax.jit(function), *map(jnp.ones, shapes)), "METAL")
    assert any(fault in line for line in program.faults), program.faults


def test_a_fault_names_the_operation_and_our_line(cpu, monkeypatch):
    """A change of ours that no Metal plugin takes is reported with the line that made it."""
    from tale_jax.model import layers as ops

    source = (
        "def rms_norm(x, scale, eps):\n    return jax.numpy.cumsum(x, -1) + jax.lax.cbrt(x) * scale.astype(x.dtype)\n"
    )
    space: dict = {"jax": jax}
    exec(compile(source, str(ROOT / "tale_jax" / "model" / "ops.py"), "exec"), space)
    monkeypatch.setattr(ops, "rms_norm", space["rms_norm"])
    program = next(p for p in audit(recipe("tales", "tiny"), cpu, "METAL", jnp.float32) if p.name == "score")
    assert any("stablehlo.cbrt at tale_jax/model/ops.py:2: is not among" in fault for fault in program.faults)
    assert all("at tale_jax/model/ops.py:2: " in fault for fault in program.faults)  # also what JAX made of a call


def test_the_lists_are_lists_of_operations():
    lists = known_operations()
    assert set(lists) == {"METAL", "mps", "believed"}
    assert "stablehlo.dot_general" in lists["METAL"] & lists["mps"]
    assert not lists["believed"] & (lists["METAL"] - {"chlo.erf", "chlo.erf_inv", "chlo.next_after"})
