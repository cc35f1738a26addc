"""An update that must not count changes nothing, and the run goes on as one that never saw its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, tiny_batches, tiny_trainer

from tale_jax.hardware.stablehlo import check_program
from tale_jax.training import step as step_module
from tale_jax.training.guard import DEVIATIONS, MIN_DEVIATION, MIN_LOSSES, WINDOW, is_spike
from tale_jax.utils.outliers import no_values, with_value

STEPS = 40
NOISY = {"total_steps": STEPS, "model.dropout": 0.1, "ema.decay": 0.9}
# What the loss of a batch is multiplied by, after enough others to know a spike by.
SPOILED = {34: jnp.nan, 36: 100.0, 38: 1e38}  # no number, a spike, and gradients that overflow


@pytest.fixture
def batches():
    return tiny_batches(STEPS)


def spoil(monkeypatch, batches, spoiled):
    """From now on programs multiply the losses of windows that are in these batches, and so their gradients."""
    original = step_module.token_losses

    def token_losses(model, params, windows, *rest):
        factor = jnp.float32(1.0)
        for number, each in spoiled.items():
            is_bad = jnp.all(windows[:, None] == jnp.asarray(batches[number])[None], axis=-1).any()
            factor = jnp.where(is_bad, each, factor)
        return original(model, params, windows, *rest) * factor

    monkeypatch.setattr(step_module, "token_losses", token_losses)


def take(trainer, batches, left_out=()):
    """The state after all batches, and the metrics of each; of those left out only the step counts."""
    state, rows = trainer.init(), []
    for number, windows in enumerate(batches):
        if number in left_out:
            state = state.replace(step=state.step + 1)
            continue
        state, metrics = trainer.step(state, trainer.place(windows))
        rows.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return state, rows


def skipped(rows):
    return [number for number, row in enumerate(rows) if row["skipped"]]


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "devices"), [(8, 1), (4, 1), (8, 4)])
def test_after_bad_batches_every_bit_is_that_of_a_run_that_never_saw_them(monkeypatch, batches, micro, devices):
    spoil(monkeypatch, batches, SPOILED)  # one program for both runs: another may round in other places
    trainer = tiny_trainer(devices, **NOISY, micro_batch_size=micro)
    never, wanted = take(trainer, batches, left_out=SPOILED)
    state, rows = take(trainer, batches)
    assert skipped(rows) == list(SPOILED)
    assert_trees_equal(state, never)
    assert [row["loss"] for row in rows if not row["skipped"]] == [row["loss"] for row in wanted]


@pytest.mark.slow
def test_an_overflow_of_float16_lowers_the_scale_and_nothing_else(monkeypatch, batches):
    bad, more = 5, {"dtype": jnp.float16, **NOISY}
    spoil(monkeypatch, batches, {bad: 1e38})
    trainer = tiny_trainer(**more)
    never, _ = take(trainer, batches[: bad + 1], left_out=(bad,))
    state, rows = take(trainer, batches[: bad + 1])
    assert skipped(rows) == [bad] and rows[bad]["loss_scale"] == rows[bad - 1]["loss_scale"] / 2
    assert_trees_equal(state.replace(scale=never.scale), never)


@pytest.mark.slow
def test_with_the_guard_off_a_spike_counts_and_what_is_no_number_does_not(monkeypatch, batches):
    spoil(monkeypatch, batches, SPOILED)
    state, rows = take(tiny_trainer(**NOISY, on_spike="off"), batches)
    assert skipped(rows) == [34, 38]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree_util.tree_leaves(state.params))


def losses_of(values):
    recent = no_values(WINDOW)
    for value in values:
        recent = with_value(recent, jnp.float32(value), jnp.bool_(True))
    return recent


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_spike_is_told_by_median_and_deviation_of_the_losses_before(spread):
    rng = np.random.default_rng(0)
    values = 5.0 + spread * rng.standard_normal(WINDOW)
    values[3] = 1e6  # one outlier moves neither
    median = np.median(values)
    bound = median + DEVIATIONS * max(1.4826 * np.median(np.abs(values - median)), MIN_DEVIATION * median)
    recent = losses_of(values)
    assert is_spike(recent, jnp.float32(1.001 * bound)) and not is_spike(recent, jnp.float32(0.999 * bound))
    assert not is_spike(losses_of(values[: MIN_LOSSES - 1]), jnp.float32(1e6))
    assert is_spike(losses_of([*rng.uniform(100, 200, WINDOW), *values]), jnp.float32(1.001 * bound))  # a ring


@pytest.mark.parametrize("platform", ["METAL", "mps"])
def test_metal_has_what_the_guard_computes_with(platform):
    lowered = jax.jit(is_spike).trace(no_values(WINDOW), jnp.float32(1)).lower(lowering_platforms=(platform,))
    assert not check_program("guard", lowered.compiler_ir("stablehlo"), platform).faults
