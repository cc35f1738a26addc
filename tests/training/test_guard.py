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

BAD = 35  # number of the batch that is spoiled, after enough others to know a spike by
STEPS = 40
NOISY = {"total_steps": STEPS, "model.dropout": 0.1, "ema.decay": 0.9}
# What the loss of the bad batch is multiplied by, in the dtype that the run computes in.
SPOILED = {"nan": jnp.nan, "spike": 100.0, "overflow": 1e38}


@pytest.fixture
def batches():
    return tiny_batches(STEPS)


def spoil(monkeypatch, batch, factor):
    """From now on programs multiply the loss of windows that are in `batch` by `factor`, and so the gradients."""
    original = step_module.token_losses

    def token_losses(model, params, windows, *rest):
        is_bad = jnp.all(windows[:, None] == jnp.asarray(batch)[None], axis=-1).any()
        return original(model, params, windows, *rest) * jnp.where(is_bad, factor, 1.0)

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


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize(("micro", "devices"), [(8, 1), (4, 1), (8, 4)])
def test_after_a_bad_batch_every_bit_is_that_of_a_run_that_never_saw_it(monkeypatch, batches, name, micro, devices):
    more = NOISY | {"micro_batch_size": micro}
    never, wanted = take(tiny_trainer(devices, **more), batches, left_out=(BAD,))
    spoil(monkeypatch, batches[BAD], SPOILED[name])
    state, rows = take(tiny_trainer(devices, **more), batches)
    assert [number for number, row in enumerate(rows) if row["skipped"]] == [BAD]
    assert_trees_equal(state, never)
    assert [row["loss"] for row in rows[BAD + 1 :]] == [row["loss"] for row in wanted[BAD:]]


@pytest.mark.slow
def test_an_overflow_of_float16_lowers_the_scale_and_nothing_else(monkeypatch, batches):
    more = {"dtype": jnp.float16, **NOISY}
    never, _ = take(tiny_trainer(**more), batches[: BAD + 1], left_out=(BAD,))
    spoil(monkeypatch, batches[BAD], 1e38)
    state, rows = take(tiny_trainer(**more), batches[: BAD + 1])
    assert rows[BAD]["skipped"] and rows[BAD]["loss_scale"] == rows[BAD - 1]["loss_scale"] / 2
    assert_trees_equal(state.replace(scale=never.scale), never)


@pytest.mark.slow
def test_with_the_guard_off_a_spike_counts_and_what_is_no_number_does_not(monkeypatch, batches):
    spoil(monkeypatch, batches[BAD], SPOILED["spike"])
    _, rows = take(tiny_trainer(**NOISY, on_spike="off"), batches)
    assert not any(row["skipped"] for row in rows)
    monkeypatch.undo()
    spoil(monkeypatch, batches[BAD], SPOILED["nan"])
    state, rows = take(tiny_trainer(**NOISY, on_spike="off"), batches)
    assert [number for number, row in enumerate(rows) if row["skipped"]] == [BAD]
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
