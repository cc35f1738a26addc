"""The plan: its numbers against what they stand for, its verdict, and its advice where a run does not fit."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, build_config, run_script

from tale_jax.config import change, leaves
from tale_jax.data.prepare import prepare
from tale_jax.hardware.backend import for_mac
from tale_jax.model.transformer import flops_per_token
from tale_jax.planning import plan
from tale_jax.planning.plan import Plan, find_advice, headline, make_mac_plan, make_plan, print_plan, refusal, remedies
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.training.checkpoint import Checkpoints
from tale_jax.training.step import Trainer, make_trainer

STATE = ("weights", "optimizer", "ema", "gradients", "process")
TINY = {"precision": "float32", "model.embed_dim": 32, "model.seq_len": 64}


def planned(backend, budget=0, num_windows=0, **changes):
    config = build_config(**TINY | changes).with_total_steps()
    trainer = make_trainer(config, backend, jnp.float32, UntrainedTokenizer.bos_id)
    return config, trainer, plan.plan_run(config, trainer, trainer.compile(), backend, budget, "asked for", num_windows)


@pytest.fixture(scope="module")
def made(cpu) -> Plan:
    """The plan of the tiny recipe with windows of 64 tokens."""
    return planned(cpu)[2]


def test_numbers_are_those_of_the_run(cpu):
    config, trainer, made = planned(cpu, num_windows=40)
    params = trainer.abstract_state.params
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))
    assert (made.parameters, made.embedding_parameters) == (count, 512 * 32)
    assert made.flops_per_token == flops_per_token(config.model, 512)
    assert (made.tokens_per_step, made.total_steps, made.tokens) == (4 * 64, 20, 20 * 4 * 64)
    assert made.passes == 20 * 4 / 40
    assert made.tokens_per_parameter == pytest.approx(20 * 4 * 64 / count)
    assert (made.precision, made.precision_reason) == ("float32", "asked for")
    assert (made.tokens_per_second, made.seconds, made.advice) == (0, None, ())
    state_bytes = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(trainer.init()))
    assert made.checkpoint_bytes == state_bytes
    assert made.disk_bytes == state_bytes * (config.checkpoint.keep + 2)


def test_a_checkpoint_holds_the_moving_average_too(cpu, made):
    with_ema = planned(cpu, **{"ema.decay": 0.99})[2]
    assert with_ema.checkpoint_bytes == made.checkpoint_bytes + made.memory.weights


def test_length_is_unknown_until_the_text_is_there(cpu, tmp_path):
    made = planned(cpu, total_steps=0)[2]
    assert made.total_steps is made.tokens is made.tokens_per_parameter is made.passes is None
    config = build_config(**TINY | {"total_steps": 0, "passes": 2.0, "corpus.num_train_tales": 60})
    prepared = prepare(config, tmp_path)
    made = make_plan(config, cpu, tmp_path, timed=False)
    num_tales = 60
    tokens = prepared.manifests["train"].tokens
    assert made.total_steps * 4 >= 2 * num_tales  # each tale starts a window
    assert made.total_steps * 4 * 64 >= 2 * (tokens - num_tales - 2 * 64)
    assert made.passes == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("share", "fits"), [(0, True), (1.0, True), (0.99, False)])
def test_a_run_fits_when_its_peak_is_within_the_budget(cpu, monkeypatch, made, share, fits):
    monkeypatch.setattr(plan, "measure_memory", lambda *args: made.memory)
    again = planned(cpu, budget=int(share * made.peak_bytes))[2]
    assert again.fits == fits
    assert again.peak_bytes == again.memory.peak == made.memory.peak


@pytest.mark.slow
def test_a_mac_is_planned_for_on_any_machine(cpu):
    """Of its memory the GPU has two thirds, nothing is donated, no process counts, and nothing is timed."""
    config = build_config(**TINY | {"precision": "auto", "batch_size": 16})
    made = make_mac_plan(config, cpu, memory=3 * 10**9)
    assert (made.platform, made.precision, made.budget_bytes) == ("metal", "float32", 2 * 10**9)
    assert made.memory.process == 0 and made.memory.results >= made.memory.weights and made.tokens_per_second == 0
    assert made.fits and made.peak_bytes < 10**9
    assert make_mac_plan(config, cpu).budget_bytes == 8 * 10**9 * 2 // 3
    bfloat16 = make_mac_plan(change(config, {"precision": "bfloat16"}), cpu)
    assert (bfloat16.precision, bfloat16.precision_reason) == ("bfloat16", "as the config says")
    less = make_mac_plan(config, cpu, memory=made.peak_bytes)  # of which two thirds are not enough
    assert not less.fits and less.advice
    assert all(advice.peak_bytes <= less.budget_bytes and advice.speed == 0 for advice in less.advice)


def test_time_is_that_of_the_steps_and_of_validation(cpu, monkeypatch, made):
    """On a clock on which scoring a batch takes 0.5 s."""
    config = build_config(**TINY | {"evaluate.every_steps": 8, "evaluate.max_windows": 10}).with_total_steps()
    trainer = make_trainer(config, cpu, jnp.float32, UntrainedTokenizer.bos_id)
    ticks = iter(np.arange(0.0, 10.0, 0.5).tolist())
    monkeypatch.setattr(plan, "time_steps", lambda config, trainer: 2.0)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))
    timed = plan.with_time(made, config, trainer)
    assert timed.tokens_per_second == 4 * 64 / 2.0
    # Three validations in 20 steps, each of three batches of four windows.
    assert timed.seconds == 20 * 2.0 + 3 * 3 * 0.5
    assert plan.with_time(dataclasses.replace(made, total_steps=None), config, trainer).seconds is None


def test_a_run_that_could_not_be_held_is_not_timed(cpu, monkeypatch):
    monkeypatch.setattr(plan, "find_advice", lambda *args: ())
    monkeypatch.setattr(plan, "with_time", lambda *args: pytest.fail("timed"))
    config = build_config(**TINY)
    assert not make_plan(config, dataclasses.replace(cpu, memory=1000), budget=10**12).tokens_per_second
    assert make_plan(config, dataclasses.replace(cpu, memory=1000)).budget_bytes == 1000
    assert not make_plan(config, cpu, timed=False).tokens_per_second


# Advice.


def test_advice_fits_has_one_order_and_is_three_at_most(cpu, monkeypatch, made):
    """The order is that of the candidates: times that are measured under load must not change it."""
    speeds = iter([1.0, 3.0, 2.0, 4.0])
    peaks = iter([200, 90, 80, 70, 60, 50])
    made = dataclasses.replace(made, memory=dataclasses.replace(made.memory, **dict.fromkeys(STATE, 10)))
    monkeypatch.setattr(Trainer, "compile", lambda self: None)
    monkeypatch.setattr(plan, "time_steps", lambda config, trainer, num_steps: 256 / next(speeds))
    monkeypatch.setattr(plan, "measure_memory", lambda *args: dataclasses.replace(made.memory, peak=next(peaks)))
    advice = find_advice(build_config(**TINY).with_total_steps(), cpu, dataclasses.replace(made, budget_bytes=100))
    assert [change.peak_bytes for change in advice] == [90, 80, 70]
    rates = [change.tokens_per_second for change in advice]
    assert [change.speed for change in advice] == [rate / max(rates) for rate in rates]
    planned_rate = dataclasses.replace(made, budget_bytes=100, tokens_per_second=6.0)
    peaks, speeds = iter([90, 200] + [200] * 20), iter([3.0])
    [only] = find_advice(build_config(**TINY).with_total_steps(), cpu, planned_rate)
    assert only.speed == only.tokens_per_second / 6.0


def test_what_the_state_alone_is_too_large_for_is_not_tried(cpu, monkeypatch, made):
    monkeypatch.setattr(Trainer, "compile", lambda self: pytest.fail("compiled"))
    config = build_config(**TINY).with_total_steps()
    needed = sum(getattr(made.memory, name) for name in STATE)
    assert find_advice(config, cpu, dataclasses.replace(made, budget_bytes=needed - 1)) == ()


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_from_its_shapes(cpu, monkeypatch):
    """Before anything is compiled where the state is too large; else with a change that was tried and makes it fit."""
    config = build_config(**TINY | {"batch_size": 64, "model.seq_len": 256})
    mac = for_mac(cpu, 10**12)  # where no process counts, so that the numbers are those of the step
    monkeypatch.setattr(plan, "choose_precision", lambda *_: (jnp.float32, "asked for"))
    made = make_mac_plan(config, cpu, memory=10**12)
    plan.check_fits(config, mac)
    memory = made.memory
    tight = dataclasses.replace(mac, memory=memory.peak - memory.activations // 2)
    with pytest.raises(ValueError, match=r"^this run needs \d+ MB of memory and may use \d+ MB; try --config") as error:
        plan.check_fits(config, tight)
    named = dict(re.findall(r"--config\.([\w.]+)=(\w+)", str(error.value).partition(" (then")[0]))
    typed = {name: type(dict(leaves(config))[name])(value) for name, value in named.items()}
    assert typed and make_plan(change(config, typed), tight, timed=False, precision=(jnp.float32, "")).fits
    monkeypatch.setattr(Trainer, "compile", lambda self: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=r"needs at least .* is enough: make the model smaller: lower model.embed_dim"):
        plan.check_fits(config, dataclasses.replace(mac, memory=10**5))
    plan.check_fits(change(config, {"backend.ignore_memory": True}), dataclasses.replace(mac, memory=10**5))
    plan.check_fits(config, dataclasses.replace(mac, memory=10**11))  # by far enough


def test_candidates_are_settings_that_differ():
    config = build_config(batch_size=12, remat="block", precision="bfloat16", **{"model.scan_layers": True})
    candidates = list(plan._candidate_changes(config))
    assert {"micro_batch_size": 6} in candidates and {"micro_batch_size": 1} in candidates
    assert len({json.dumps(settings) for settings in candidates}) == len(candidates)
    for settings in candidates:
        changed = change(config, settings)
        assert config.difference(changed) is None or "precision" in settings
        assert changed != config
    assert not [settings for settings in candidates if "precision" in settings or settings.get("remat") == "block"]


@pytest.mark.parametrize(("number", "bound", "divisor"), [(12, 5, 4), (12, 12, 12), (7, 6, 1), (12, 0, 1), (1, 1, 1)])
def test_micro_batches_divide_the_batch(number, bound, divisor):
    assert plan._largest_divisor(number, bound) == divisor


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "try --config.remat=block --config.model.scan_layers=True or --config.micro_batch_size=2 ("),
        ({"remat": "block", "model.scan_layers": True}, "try --config.micro_batch_size=2 ("),
        ({"remat": "block", "micro_batch_size": 1}, "try --config.remat=block --config.model.scan_layers=True ("),
        ({"remat": "block", "model.scan_layers": True, "micro_batch_size": 1}, "make the model smaller: lower "),
    ],
)
def test_remedies_are_flags_that_change_something(changes, words):
    assert remedies(build_config(**changes)).startswith(words)


# What a user sees.


def test_a_plan_in_one_line(cpu, monkeypatch, made):
    small = dataclasses.replace(made, peak_bytes=3 * 10**6, budget_bytes=2 * 10**9, checkpoint_bytes=10**6)
    small = dataclasses.replace(small, disk_bytes=5 * 10**6)
    line = headline(small)
    assert line.startswith("plan: peak memory 3 MB of 2.00 GB (the step ")
    assert line.endswith("a checkpoint takes 1 MB of disk, all of them 5 MB")
    assert ", the process " in line
    gpu = dataclasses.replace(small, budget_bytes=0, memory=dataclasses.replace(made.memory, process=0))
    assert "peak memory 3 MB (the step " in headline(gpu) and "process" not in headline(gpu)
    monkeypatch.setattr(
        plan, "find_advice", lambda *_, **__: (plan.FittingChange({"remat": "block"}, 10**6, 0.0, 0.0),)
    )
    line = refusal(small, build_config(), cpu)
    assert line.startswith(
        "this run needs 3 MB of memory and may use 2.00 GB; try --config.remat=block (then 1 MB), or"
    )
    assert line.endswith("or start all the same: --config.backend.ignore_memory=True")


def test_tables_tell_the_verdict_and_the_advice(made, capsys):
    print_plan(made)  # of a step that takes less than its checkpoint
    assert "checkpoint, while it is written" in capsys.readouterr().out
    made = dataclasses.replace(made, memory=dataclasses.replace(made.memory, checkpoint=0))
    print_plan(made)
    out = capsys.readouterr().out
    assert "asked for" in out and "20 steps, 5,120 tokens" in out and "not measured" in out and "fit" not in out
    assert all(part in out for part in ("weights", "optimizer", "gradients", "logits", "activations", "peak"))
    assert "scratch of the compiled program" in out
    advice = plan.FittingChange({"remat": "block"}, 2 * 10**6, 50.0, 0.5)
    refused = dataclasses.replace(made, budget_bytes=3 * 10**6, fits=False, advice=(advice,), tokens_per_second=100.0)
    print_plan(dataclasses.replace(refused, seconds=90.0 * 60, total_steps=None))
    out = capsys.readouterr().out
    assert "It does not fit" in out and "--config.remat=block: 2 MB, 50 tokens/s (50% of the speed)" in out
    assert "90 min for steps and scoring" in out and "known when the text is prepared" in out
    print_plan(dataclasses.replace(refused, advice=()))
    assert "make the model smaller" in capsys.readouterr().out
    print_plan(dataclasses.replace(made, budget_bytes=10**12))
    assert "It fits" in capsys.readouterr().out


def test_plan_script():
    flags = ["--config=configs/tales.py:tiny", "--config.precision=float32", "--json"]
    done = run_script("plan", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak_bytes"] > 0 and result["fits"] and result["seconds"] > 0
    assert result["total_steps"] == 20 and result["tokens_per_second"] > 0
    done = run_script("plan", *flags, "--memory=lots")
    assert done.returncode == 2 and "try --memory=8GB" in done.stderr


@pytest.mark.slow
def test_plan_script_tells_what_would_fit_and_how_well_it_predicted():
    shape = ["--config=configs/tales.py:tiny", "--config.batch_size=32", "--config.model.seq_len=256"]
    shape += ["--config.model.num_layers=6", "--config.model.embed_dim=128", "--config.precision=float32"]
    done = run_script("plan", *shape, "--json", "--measure", "--notime")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.splitlines()[-1])
    calibration = whole["calibration"]
    assert calibration["predicted_bytes"] == pytest.approx(calibration["measured_bytes"], rel=0.15)
    budget = whole["peak_bytes"] - 0.5 * whole["memory"]["activations"]
    done = run_script("plan", *shape, f"--memory={budget:.0f}", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["fits"] and 1 <= len(result["advice"]) <= 3
    assert all(advice["peak_bytes"] <= budget for advice in result["advice"])


# Memory is limited after everything is compiled, to less than the next step needs between its passes.
STARVE = """
import os, resource, sys
sys.path[:0] = [{launch!r}, {root!r}, {tests!r}]
os.environ.pop("XLA_FLAGS", None)  # one device
from pathlib import Path
from cli import run
from helpers import build_config
from tale_jax.hardware.backend import start_backend
from tale_jax.runs.train import RunHooks, train

def starve(self, step, metrics):
    if step == 4:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + (16 << 20),) * 2)
    return on_metrics(self, step, metrics)

on_metrics = RunHooks.on_metrics
RunHooks.on_metrics = starve
def main(_):
    changes = {{"checkpoint.every_steps": 3, "batch_size": 128, "precision": "float32"}}
    train(build_config(**changes), Path({workdir!r}), start_backend("cpu"))

run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_a_process_without_memory_ends_in_one_line(tmp_path):
    folders = {"launch": str(ROOT / "launch"), "root": str(ROOT), "tests": str(ROOT / "tests")}
    script = STARVE.format(**folders, workdir=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "error: memory ran out" in done.stderr.splitlines()[-1]
    saved = Checkpoints(tmp_path / "run", 1).latest
    assert saved, "steps before the fourth were saved"
    assert f"the checkpoint of step {saved} is intact" in done.stderr
