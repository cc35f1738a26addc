"""The plan: its numbers against what they stand for, its verdicts, and what happens when memory runs out."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, build_config, run_script

from tale_jax.config import change
from tale_jax.hardware import backend
from tale_jax.model.transformer import flops_per_token
from tale_jax.planning import memory, plan
from tale_jax.runs.train import train
from tale_jax.training.checkpoint import Checkpoints
from tale_jax.training.step import make_trainer
from tale_jax.utils.format import parse_bytes

TINY = {"precision": "float32", "model.embed_dim": 32, "model.seq_len": 64}


def planned(cpu, **changes):
    config = plan.without_data(build_config(**TINY | changes))
    trainer = make_trainer(config, cpu, jnp.float32, 1)
    return config, trainer, plan.plan_run(config, trainer, cpu, 0, "asked for")


def test_numbers_are_those_of_the_run(cpu):
    config, trainer, made = planned(cpu, **{"optimizer.name": "adamw"})
    params = trainer.abstract_state.params
    sizes = {name: leaf.size for name, leaf in [("embedding", params["embedding"])]}
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))
    assert (made.parameters, made.embedding_parameters) == (count, sizes["embedding"])
    assert made.flops_per_token == flops_per_token(config.model, 512)
    assert (made.total_steps, made.tokens) == (20, 20 * 4 * 64)
    assert made.tokens_per_parameter == pytest.approx(20 * 4 * 64 / count)
    assert made.memory.weights == 4 * count
    assert 2 * 4 * count <= made.memory.optimizer < 2 * 4 * count + 1000
    assert made.checkpoint_bytes >= 12 * count
    assert made.memory.decode_cache == 2 * 2 * 64 * 32 * 4 + 64 * 4 + 4  # keys and values, positions, length
    assert made.fits and made.peak_bytes == made.memory.peak > made.memory.process


def test_an_average_takes_as_much_as_the_weights_and_short_windows_change_nothing(cpu):
    made = planned(cpu, **{"ema.decay": 0.99, "schedule.short_seq_fraction": 0.5})[2]
    plain = planned(cpu)[2]
    assert made.memory.ema_params == made.memory.weights and plain.memory.ema_params == 0
    assert made.checkpoint_bytes == plain.checkpoint_bytes + plain.memory.weights
    assert made.memory.batch == plain.memory.batch and made.memory.logits == plain.memory.logits


def test_the_compiler_agrees_on_what_a_step_is_given_and_runs_it(cpu):
    config, trainer, made = planned(cpu)
    state = trainer.init()
    held = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(state))
    assert made.checkpoint_bytes == held
    windows = plan.random_windows(config)
    state, metrics = trainer.step(state, trainer.place(windows))
    assert int(state.step) == 1 and jnp.isfinite(metrics["loss"])


def test_a_mac_is_planned_for_on_any_machine(cpu):
    """Of its memory the GPU has two thirds, nothing is donated, no process counts, and nothing is timed."""
    config = build_config(**TINY | {"precision": "auto", "batch_size": 16})
    made = plan.make_mac_plan(config, cpu, memory=3 * 10**9)
    assert (made.platform, made.precision, made.budget_bytes) == ("metal", "float32", 2 * 10**9)
    assert made.memory.process == 0 and made.memory.results >= made.memory.weights and made.tokens_per_second == 0
    assert made.fits and made.peak_bytes < 10**9
    less = plan.make_mac_plan(config, cpu, memory=made.peak_bytes)  # of which two thirds are not enough
    assert not less.fits and less.advice
    assert all(change.peak_bytes <= less.budget_bytes and change.speed == 0 for change in less.advice)


def between(made) -> int:
    return made.memory.gradients + made.memory.logits + made.memory.activations


def test_remat_and_micro_batches_hold_less(cpu):
    shape = {"model.num_layers": 4, "batch_size": 16}
    plain, remat, micro = (
        between(planned(cpu, **shape | change)[2])
        for change in ({}, {"remat": "block", "model.scan_layers": True}, {"micro_batch_size": 2})
    )
    assert remat < 0.8 * plain and micro < 0.8 * plain


def test_only_bfloat16_products_of_many_terms_keep_more_than_the_compiler_says():
    text = """
      p0 = bf16[16,384]{1,0} parameter(0)
      %p1 = bf16[384,32]{1,0} parameter(1)
      %long = bf16[16,32]{1,0} dot(p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %q0 = bf16[16,64]{1,0} parameter(2)
      %short = bf16[16,32]{1,0} dot(bf16[16,64]{1,0} %q0, bf16[64,32]{1,0} %q1), lhs_contracting_dims={1}
      %wide = f32[16,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    """
    assert memory._bfloat16_products(text) == 4 * 16 * 32


def test_logits_are_found_in_the_program(cpu):
    assert planned(cpu)[2].memory.logits == 4 * 64 * 512 * 4


def test_without_donation_results_take_memory_of_their_own(cpu):
    config = plan.without_data(build_config(**TINY))
    here = dataclasses.replace(cpu, donate=False)
    made = plan.plan_run(config, make_trainer(config, backend, jnp.float32, 1), backend, 0, "")
    assert made.memory.results >= made.memory.weights + made.memory.optimizer


def test_length_is_unknown_until_the_text_is_there(cpu):
    made = planned(cpu, total_steps=0)[2]
    assert made.total_steps is made.tokens is made.tokens_per_parameter is made.passes is None


def test_advice_fits_is_sorted_by_speed_and_is_three_at_most(cpu, monkeypatch):
    speeds = iter([1.0, 3.0, 2.0, 4.0])
    peaks = iter([200, 90, 80, 70, 60, 50])
    monkeypatch.setattr(plan, "time_steps", lambda *a: 1 / next(speeds))
    made = dataclasses.replace(planned(cpu)[2], budget_bytes=100)
    held = made.memory
    monkeypatch.setattr(plan, "measure_memory", lambda *a: dataclasses.replace(held, peak=next(peaks)))
    advice = plan.advise(build_config(**TINY), cpu, made)
    assert len(advice) == 3 and all(change.peak_bytes <= 100 for change in advice)
    assert [change.speed for change in advice] == sorted((c.speed for c in advice), reverse=True)
    assert advice[0].speed == 1.0


def test_changes_are_settings_that_differ():
    config = build_config(batch_size=12, remat="block", precision="bfloat16", **{"model.scan_layers": True})
    changes = list(plan._changes(config))
    assert {"micro_batch_size": 6} in changes and {"micro_batch_size": 1} in changes
    for settings in changes:
        changed = change(config, settings)
        assert config.difference(changed) is None or "precision" in settings
        assert changed != config


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("512mb", 512 * 10**6), ("1.5GiB", 3 << 29), ("7", 7), ("", 0)]
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["eight", "8XB", "1.2.3GB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"memory={text} must be a number of bytes; try --memory=8GB"):
        parse_bytes(text)


def test_a_run_that_cannot_fit_is_refused_before_it_starts_unless_told_to(cpu, tmp_path):
    small = TINY | {"total_steps": 2, "corpus.num_train_tales": 60, "backend.memory_gb": 0.01}
    with pytest.raises(ValueError, match=r"this run needs .* may use 10 MB; try .*--config.backend.ignore_memory=True"):
        train(build_config(**small), tmp_path, cpu)
    assert not (tmp_path / "config.json").exists()
    assert train(build_config(**small | {"backend.ignore_memory": True}), tmp_path, cpu).step == 2


def test_running_out_of_memory_is_told_with_advice_and_keeps_the_checkpoint(cpu, tmp_path, monkeypatch):
    from tale_jax.training import loop

    def grow(self, record):
        if record["step"] == 12:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 999 bytes")
        return original(self, record)

    original = loop._Observer.record
    monkeypatch.setattr(loop._Observer, "record", grow)
    config = build_config(**TINY | {"corpus.num_train_tales": 60, "metrics.every_steps": 1})
    with pytest.raises(MemoryError, match=r"the checkpoint of step 10 is intact.*--config.micro_batch_size=2") as error:
        train(config, tmp_path, cpu)
    assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path, 1).latest == 10
    monkeypatch.undo()
    assert train(config, tmp_path, cpu).step == 20


# Memory is limited after everything is compiled, to less than the next step needs for what it holds in between.
STARVE = """
import os, resource, sys
sys.path[:0] = [{launch!r}, {root!r}]
from pathlib import Path
from tests.conftest import build_config
os.environ.pop("XLA_FLAGS")  # one device
from tale_jax.hardware import backend
from tale_jax.training import loop

def starve(self, record):
    if record["step"] == 4:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + (16 << 20),) * 2)
    return original(self, record)

original = loop._Observer.record
loop._Observer.record = starve
def main(_):
    changes = {{"metrics.every_steps": 1, "checkpoint.every_steps": 3, "batch_size": 128, "precision": "float32"}}
    loop.train(build_config(**changes), Path({workdir!r}), start_backend("cpu"))

from cli import run
run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_a_process_without_memory_ends_in_one_line(tmp_path):
    script = STARVE.format(launch=str(ROOT / "launch"), root=str(ROOT), workdir=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "error: memory ran out" in done.stderr.splitlines()[-1]
    saved = Checkpoints(tmp_path / "run", 1).latest
    assert saved, "steps before the fourth were saved"
    assert f"the checkpoint of step {saved} is intact" in done.stderr


def test_plan_script(tmp_path):
    flags = ["--config=configs/tales.py:tiny", "--config.precision=float32", "--json"]
    done = run_script("plan", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak_bytes"] > 0 and result["fits"] and result["seconds"] > 0
    assert result["total_steps"] == 20 and result["tokens_per_second"] > 0
    done = run_script("plan", *flags, "--memory=lots")
    assert done.returncode == 2 and "try --memory=8GB" in done.stderr


@pytest.mark.slow
def test_plan_script_tells_what_would_fit_and_how_right_it_is():
    shape = ["--config.batch_size=32", "--config.model.seq_len=256", "--config.model.num_layers=6"]
    shape += ["--config.model.embed_dim=128", "--config.precision=float32", "--config=configs/tales.py:tiny"]
    shape = sorted(shape, key=lambda flag: flag != "--config=configs/tales.py:tiny")
    done = run_script("plan", *shape, "--json", "--measure", "--notime")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.splitlines()[-1])
    calibration = whole["calibration"]
    assert calibration["predicted_bytes"] == pytest.approx(calibration["measured_bytes"], rel=0.15)
    budget = whole["peak_bytes"] - 0.5 * whole["memory"]["activations"]
    done = run_script("plan", *shape, f"--memory={budget:.0f}", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["fits"] and 1 <= len(result["advice"]) <= 3
    assert all(change["peak_bytes"] <= budget for change in result["advice"])


def test_the_time_of_a_step_is_the_mean_over_the_phases(cpu, monkeypatch):
    config, trainer, _ = planned(cpu, **{"schedule.small_fraction": 0.25, "schedule.small_divisor": 4})
    clock = [0.0]

    def taking(seconds):
        def update(state, windows):
            clock[0] += seconds
            return state, {"loss": 0.0}

        return update

    trainer.step, trainer.early_step = taking(8.0), taking(3.0)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock[0])
    assert plan.time_steps(config, trainer) == 0.25 * 4 * 3.0 + 0.75 * 8.0
