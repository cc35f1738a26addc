"""The memory of a step: its parts against the arrays they stand for, read from programs that were really compiled."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import build_config

from tale_jax.hardware import machine
from tale_jax.hardware.backend import for_mac
from tale_jax.planning import memory
from tale_jax.planning.memory import (
    aliased_bytes,
    bfloat16_product_bytes,
    largest_logits_bytes,
    measure_memory,
    tree_bytes,
)
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.training.step import make_trainer

TINY = {"precision": "float32", "model.embed_dim": 32, "model.seq_len": 64}


@functools.cache
def measured(backend, dtype=jnp.float32, process=1 << 20, **changes):
    """Config, trainer, compiled step and its memory."""
    config = build_config(**TINY | changes).with_total_steps()
    trainer = make_trainer(config, backend, dtype, UntrainedTokenizer.bos_id)
    compiled = trainer.compile()
    return config, trainer, compiled, measure_memory(config, trainer, compiled, backend, process)


def compiled_text(function, *shapes, dtype=jnp.bfloat16):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile().as_text()


@pytest.mark.parametrize("process", [1 << 20, 1 << 40, 0])
@pytest.mark.parametrize("changes", [{}, {"ema.decay": 0.9, "batch_size": 8}, {"model.embed_dim": 256}])
def test_the_parts_at_the_peak_sum_to_it(cpu, process, changes):
    """In a step, and where a checkpoint takes more; `process=0` counts what this process has held before."""
    made = measured(cpu, process=process, **changes)[3]
    parts = made.parts_at_peak()
    assert sum(parts.values()) == made.peak and min(parts.values()) >= 0
    assert ("checkpoint" in parts) == (made.checkpoint > made.step_only)
    assert made.scratch > 0 and (process == 0 or parts["before the first step"] < 1000)


@pytest.mark.slow
def test_the_parts_sum_to_the_peak_on_a_gpu_and_on_devices_that_share_weights(cpu):
    for backend, changes in (
        (for_mac(cpu, 10**10), {}),
        (dataclasses.replace(cpu, platform="cuda", devices=tuple(jax.devices()[:4])), {"mesh.fsdp": 4}),
        (dataclasses.replace(cpu, devices=tuple(jax.devices()[:4])), {"mesh.fsdp": 2}),
    ):
        process = 1 << 20 if backend.platform == "cpu" else 0
        parts = (made := measured(backend, process=process, **changes)[3]).parts_at_peak()
        assert sum(parts.values()) == made.peak and min(parts.values()) >= 0, (parts, made.peak)


# The logits.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_logits_of_a_compiled_step_are_found(cpu, dtype):
    """They are the largest array along the vocabulary, for all positions of the batch; the compiler counts them too."""
    _, _, compiled, made = measured(cpu, dtype)
    num_logits = (4 * 64) * 512
    assert made.logits in {num_logits * 4, num_logits * 2}  # XLA may compute bfloat16 in float32
    assert made.logits <= compiled.memory_analysis().temp_size_in_bytes
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", compiled.as_text())}
    assert max(math.prod(shape) for shape in shapes if 512 in shape and 32 not in shape) == num_logits


def test_twice_the_batch_has_twice_the_logits(cpu):
    assert measured(cpu, batch_size=8)[3].logits == 2 * measured(cpu)[3].logits


def test_weights_along_the_vocabulary_are_not_logits():
    def step(table, x):
        return jnp.tanh(table @ x.T).sum(0), table * 2

    text = compiled_text(step, (512, 32), (24, 32), dtype=jnp.float32)
    assert largest_logits_bytes(text, 512, 32) == 512 * 24 * 4
    assert largest_logits_bytes(text, 511, 32) == 0


# Products in bfloat16.


def multiplies_in_bfloat16(text: str) -> bool:
    """Elsewhere XLA multiplies bfloat16 in float32, and the compiler counts all that it takes."""
    return re.search(r" = bf16\[[\d,]*\]\S* dot\(", text) is not None


@pytest.mark.parametrize(
    ("function", "shapes", "results"),
    [
        (lambda x, w: x @ w, [(16, 512), (512, 64)], 16 * 64),
        (lambda x, w: x @ w, [(16, 256), (256, 64)], 0),  # few terms
        (lambda x, w: x @ w.T, [(16, 512), (64, 512)], 16 * 64),
        (lambda x, w: x.T @ w, [(512, 16), (512, 64)], 16 * 64),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), [(3, 16, 512), (3, 512, 64)], 3 * 16 * 64),
        (lambda x, v, w: x @ v @ w, [(16, 512), (512, 320), (320, 64)], 16 * 320 + 16 * 64),
    ],
    ids=["plain", "256 terms", "right transposed", "left transposed", "batched", "two"],
)
def test_products_of_many_terms_in_bfloat16_are_counted_in_float32(function, shapes, results):
    text = compiled_text(function, *shapes)
    assert bfloat16_product_bytes(text) == (4 * results if multiplies_in_bfloat16(text) else 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_products_in_other_dtypes_are_not_counted(dtype):
    assert bfloat16_product_bytes(compiled_text(lambda x, w: x @ w, (16, 512), (512, 64), dtype=dtype)) == 0


def test_the_products_of_a_compiled_step_are_counted(cpu):
    """Of the MLP of 512 neurons down to 32, in each of two layers; nothing of a step in float32."""
    text = measured(cpu, jnp.bfloat16, **{"model.mlp_dim": 512})[2].as_text()
    if multiplies_in_bfloat16(text):
        assert bfloat16_product_bytes(text) >= 2 * 4 * (4 * 64) * 32
    assert bfloat16_product_bytes(measured(cpu)[2].as_text()) == 0


# Donated arguments.


@pytest.mark.parametrize("donated", [(), (0,), (1,), (0, 1)])
def test_results_in_the_memory_of_donated_arguments_are_found(donated):
    """As many bytes as the compiler says; JAX 0.4 says 0 of a program that it has compiled before."""

    def step(x, state):
        return x.sum(), {name: value + 1 for name, value in state.items()}, x + 1

    x, dtypes = jnp.zeros((3, 5), jnp.bfloat16), (jnp.float32, jnp.uint32, jnp.bool_)
    state = {str(i): jnp.zeros(7 + i, dtype) for i, dtype in enumerate(dtypes)}
    state["2"] = jnp.zeros((), jnp.int32)
    compiled = jax.jit(step, donate_argnums=donated).lower(x, state).compile()
    expected = 2 * 15 * (0 in donated) + (4 * 7 + 4 * 8 + 4) * (1 in donated)
    assert aliased_bytes(compiled.as_text()) == expected
    assert compiled.memory_analysis().alias_size_in_bytes in {0, expected}


def test_a_program_with_one_result_shows_whether_it_is_in_donated_memory():
    for donated, size in ((0, 4000), ((), 0)):
        compiled = jax.jit(lambda x: x + 1, donate_argnums=donated).lower(jnp.zeros(1000)).compile()
        assert aliased_bytes(compiled.as_text()) == size


# The parts and their sum.


def test_parts_are_those_of_the_state_and_of_the_compiler(cpu):
    _, trainer, compiled, made = measured(cpu, **{"optimizer.name": "adamw", "ema.decay": 0.99})
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(trainer.abstract_state.params))
    assert made.weights == made.ema == 4 * count
    assert 2 * 4 * count <= made.optimizer < 2 * 4 * count + 1000
    assert made.batch == 4 * 65 * 4
    assert made.decode_cache == 2 * 2 * 64 * 32 * 4 + 64 * 4 + 4  # keys and values, positions, length
    analysis = compiled.memory_analysis()
    assert made.gradients + made.logits + made.activations == analysis.temp_size_in_bytes
    arguments = made.weights + made.optimizer + made.ema + made.batch
    assert arguments <= analysis.argument_size_in_bytes < arguments + 1000  # and step, key
    assert made.step == arguments + analysis.temp_size_in_bytes + made.results
    assert tree_bytes(trainer.abstract_state) == sum(x.nbytes for x in jax.tree_util.tree_leaves(trainer.init()))


def test_without_an_average_or_a_process_these_parts_are_0(cpu):
    metal = dataclasses.replace(cpu, platform="metal")
    made = measured(metal, process=0)[3]
    assert made.ema == made.process == made.checkpoint == 0
    assert made.step <= made.peak < made.step + 1000


def test_without_donation_results_take_memory_of_their_own(cpu):
    kept = measured(dataclasses.replace(cpu, donate=False))[3]
    assert kept.results >= kept.weights + kept.optimizer
    assert measured(dataclasses.replace(cpu, donate=True))[3].results < 1000


def between(made) -> int:
    return made.gradients + made.logits + made.activations


@pytest.mark.slow
def test_remat_and_micro_batches_hold_less(cpu):
    shape = {"model.num_layers": 4, "batch_size": 16}
    plain, remat, micro = (
        between(measured(cpu, **shape | change)[3])
        for change in ({}, {"remat": "block", "model.scan_layers": True}, {"micro_batch_size": 2})
    )
    assert remat < 0.8 * plain and micro < 0.8 * plain


def test_short_windows_at_first_change_nothing(cpu):
    plain, short = measured(cpu)[3], measured(cpu, **{"schedule.short_seq_fraction": 0.5})[3]
    assert (short.batch, short.logits, short.peak) == (plain.batch, plain.logits, plain.peak)


def test_the_peak_of_a_cpu_is_the_process_with_the_step_or_a_checkpoint(cpu, monkeypatch):
    process = 10**9
    config, trainer, compiled, made = measured(cpu, process=process)
    analysis = compiled.memory_analysis()
    state = made.weights + made.optimizer + made.ema
    gaps = int(memory.HEAP_GAPS * state + memory.FLOAT32_SCRATCH * bfloat16_product_bytes(compiled.as_text()))
    step = made.results + analysis.temp_size_in_bytes + gaps
    assert made.process == process
    assert made.peak == process + analysis.argument_size_in_bytes + max(step, made.checkpoint)
    monkeypatch.setattr(memory, "max_concurrent_bytes", lambda state, overlap_io: 10**8)
    saving = measure_memory(config, trainer, compiled, cpu, process)
    assert saving.checkpoint == 1.5 * 10**8
    assert saving.peak == process + analysis.argument_size_in_bytes + saving.checkpoint


def test_the_process_is_what_it_holds_now_and_the_programs_that_come_later(cpu, monkeypatch):
    config, trainer, compiled, _ = measured(cpu)
    monkeypatch.setattr(machine, "resident_memory", lambda: 10**9)
    monkeypatch.setattr(machine, "peak_resident_memory", lambda: 10**9)
    unrolled = measure_memory(config, trainer, compiled, cpu)
    layers = config.model.num_layers
    assert unrolled.process == 10**9 + memory.LATER_PROGRAMS_BYTES + layers * memory.UNROLLED_LAYER_BYTES
    scanned = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    assert measure_memory(scanned, trainer, compiled, cpu).process == 10**9 + memory.LATER_PROGRAMS_BYTES
    monkeypatch.setattr(machine, "peak_resident_memory", lambda: 10**11)  # while compiling, which is over
    assert measure_memory(config, trainer, compiled, cpu).peak == 10**11


def test_the_devices_of_a_cpu_share_its_memory(cpu):
    two = dataclasses.replace(cpu, devices=tuple(jax.devices()[:2]))
    one, both = measured(cpu)[3], measured(two)[3]
    assert both.peak > one.peak
    assert both.peak - both.process >= 2 * both.weights


def test_the_budget_is_what_the_config_says_or_all(cpu):
    assert memory.memory_budget(build_config(**{"backend.memory_gb": 0.5}), cpu) == 5 * 10**8
    assert memory.memory_budget(build_config(), cpu) == cpu.memory
