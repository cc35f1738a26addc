"""What minutes decide: each rule by itself, the choice on a machine of known speed, and a run from command to end."""

import dataclasses
import math
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config

from configs import files
from tale_jax.config import Config
from tale_jax.data.loader import Batches, window_starts
from tale_jax.data.prepare import Prepared, prepare
from tale_jax.data.token_files import Manifest, load_tokens
from tale_jax.model.transformer import make_model
from tale_jax.planning import autotune
from tale_jax.planning.autotune import TIME_MODEL, StepCost
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.runs.train import train
from tale_jax.training.optimizer import MatrixShape, make_optimizer
from tale_jax.training.schedule import learning_rate
from tale_jax.training.state import init_state
from tale_jax.training.step import make_train_step


def text(num_bytes):
    """Prepared text of so many bytes: its size is all that is read of it."""
    sizes = {"bytes": num_bytes, "tokens": num_bytes // 4}
    manifest = Manifest(
        "train", corpus={}, seed=0, tokenizer="", tokenizer_settings={}, window_len=256, dtype="<u2", **sizes
    )
    return Prepared(Path("nowhere"), UntrainedTokenizer(512), {"train": manifest})


@pytest.fixture
def machine(monkeypatch):
    """A machine of 300 GFLOP/s on which a step compiles in 5 s; the widths it was asked to measure."""
    widths = []

    def measure(config, backend, dtype):
        widths.append(config.model.embed_dim)
        return StepCost(autotune.step_flops(config) / 3e11, 5.0)

    monkeypatch.setattr(autotune, "measure_cost", measure)
    monkeypatch.setattr(autotune, "matmul_peak", lambda dtype: 1e12)
    return widths


def find_best(cpu, minutes, num_bytes, overrides=(), **changes):
    config = build_config(minutes=minutes, precision="float32", **{"model.seq_len": 256, "batch_size": 8} | changes)
    return autotune.find_best(config, text(num_bytes), cpu, time.monotonic() + 60 * minutes, overrides)


def test_text_that_is_read_often_is_regularised_more():
    found = [autotune.regularisation(passes) for passes in (0.5, 2, 2.1, 9, 13, 1000)]
    assert found == sorted(found) and found[0].dropout == 0 < found[2].dropout < found[-1].dropout
    weight_decays = [row.weight_decay for row in found]
    assert weight_decays == sorted(weight_decays) and weight_decays[0] < weight_decays[-1]


def test_steps_fit_into_the_time_with_all_that_is_none():
    config = build_config()
    counts = [autotune.count_steps(config, left, StepCost(0.1, 5.0)) for left in (-10, 0, 10, 60, 120)]
    assert counts[:2] == [0, 0] and counts == sorted(counts) and 0 < counts[3] < 600
    assert counts[4] - counts[3] == pytest.approx(60 / 0.1 / (1 + TIME_MODEL.margin), abs=1)
    slower_to_compile = autotune.count_steps(config, 60, StepCost(0.1, 9.0))
    assert counts[3] - slower_to_compile == pytest.approx(4 * (1 + TIME_MODEL.other_programs) / 0.1, rel=0.05)
    more_validation = dataclasses.replace(config.evaluate, max_windows=config.evaluate.max_windows + 8)
    scored = autotune.count_steps(dataclasses.replace(config, evaluate=more_validation), 60, StepCost(0.1, 5.0))
    assert counts[3] - scored == pytest.approx(autotune.num_stops(0) * TIME_MODEL.scoring * 2, abs=1)


@pytest.mark.parametrize(("minutes", "stops"), [(0, 3), (3, 3), (10, 5), (20, 10), (1000, 10)])
def test_a_run_stops_every_two_minutes(minutes, stops):
    assert autotune.num_stops(minutes) == stops


def test_the_work_of_a_step_is_that_of_the_model_and_of_muon_and_what_narrow_models_add():
    adamw = build_config(**{"optimizer.name": "adamw"})
    muon = build_config(**{"optimizer.name": "muon"})
    width, body = 64, autotune.num_weights(adamw) - 512 * 64
    flops = autotune.flops_per_token(adamw.model, 512) * adamw.tokens_per_step
    narrow = 1 + TIME_MODEL.narrow_width / width
    assert autotune.step_flops(adamw) == pytest.approx(flops * narrow)
    assert autotune.step_flops(muon) == pytest.approx((flops + TIME_MODEL.muon_flops * body * width) * narrow)
    assert body == 2 * (64 * 64 * 4 + 3 * 64 * adamw.model.mlp_dim)


def test_more_minutes_never_choose_a_smaller_model(cpu, machine):
    for num_bytes in (10**6, 5 * 10**6, 10**8):
        widths = [find_best(cpu, minutes, num_bytes)[0].config.model.embed_dim for minutes in (3, 10, 30, 100, 1000)]
        assert widths == sorted(widths) and widths[-1] > widths[0]


def test_the_chosen_size_was_measured_and_is_the_best(cpu, machine):
    best, others, _ = find_best(cpu, 10, 5 * 10**6)
    assert best.config.model.embed_dim in machine and len(machine) <= autotune.MAX_MEASURED_SIZES
    assert len(others) == len(autotune.SHAPES) - 1 and all(best.bits_per_byte <= run.bits_per_byte for run in others)
    config = best.config
    assert config.model.embed_dim == 64 * config.model.num_heads and config.model.mlp_dim > config.model.embed_dim
    assert 0.8 * 600 < config.total_steps * best.step_seconds < 600
    assert best.passes == pytest.approx(config.total_steps * config.tokens_per_step / (5 * 10**6 / 4))
    row = autotune.regularisation(best.passes)
    assert (config.model.dropout, config.optimizer.weight_decay) == (row.dropout, row.weight_decay)
    assert math.ceil(config.total_steps / config.evaluate.every_steps) == autotune.num_stops(10) == 5
    assert config.evaluate.every_steps == config.checkpoint.every_steps == config.sample.every_steps
    lines = autotune.explain(best, others, text(5 * 10**6))
    assert (
        f"layers of {config.model.embed_dim}" in lines[0]
        and "would make" in lines[0]
        and lines[1].startswith("by the law of losses of ")
        and f"learning rate {config.optimizer.learning_rate:g}: " in lines[2]
        and lines[3].startswith(f"dropout {row.dropout:g}, weight decay {row.weight_decay:g}: ")
    )
    given = autotune.explain(best, others, text(5 * 10**6), {"optimizer.learning_rate", "model.dropout"})
    assert given[2:] == [lines[3].replace(f"dropout {row.dropout:g}, ", "")]  # what was given needs no reason


def test_wider_models_get_lower_learning_rates():
    recipe = build_config(**{"model.embed_dim": 64})
    config = autotune.with_size(recipe, 6, 256)
    assert (config.model.num_layers, config.model.embed_dim, config.model.num_heads) == (6, 256, 4)
    assert config.optimizer.learning_rate == pytest.approx(recipe.optimizer.learning_rate / 4)
    assert autotune.with_size(recipe, 6, 64).optimizer == recipe.optimizer
    assert autotune.with_size(recipe, 6, 256, {"optimizer.learning_rate"}).optimizer == recipe.optimizer


@pytest.mark.slow
def test_the_recipe_s_learning_rate_suits_four_times_the_width(tmp_path, cpu):
    """By the rule twice the rate does not end much lower, at either width, and the recipe's own far above."""
    recipe = files.get_config()
    recipe.corpus.update(name="tales", num_train_tales=3000, num_valid_tales=40, num_test_tales=40)
    recipe.update(total_steps=200, precision="float32")
    recipe.tokenizer.vocab_size, recipe.model.seq_len = 512, 64
    recipe = Config.build(recipe)
    prepare(recipe, tmp_path)
    tokens, _ = load_tokens(tmp_path, "train")
    batches = Batches(tokens, window_starts(tokens, 64), seq_len=64, batch_size=recipe.batch_size, seed=0)
    windows = np.stack([next(batches) for _ in range(recipe.total_steps)])
    batches.close()
    for width, own in ((32, 32 / 256), (128, 128 / 256)):
        ends = last_losses(autotune.with_size(recipe, 2, width), cpu, windows, (own, 1.0, 2.0))
        assert ends[1] < ends[2] + 0.15, (width, ends)
        assert ends[1] < ends[0] - 0.1, (width, ends)


def last_losses(config, cpu, windows, factors):
    """The mean loss of the last 50 steps, with so many times the learning rate."""
    config = config.with_total_steps()
    model, rate = make_model(config, cpu, jnp.float32), learning_rate(config.schedule, config.optimizer, len(windows))

    @jax.jit
    def losses(factor):
        optimizer = make_optimizer(
            config.optimizer, lambda step: factor * rate(step), MatrixShape(config.model.head_dim)
        )
        step = make_train_step(config, model, optimizer, rate, UntrainedTokenizer.bos_id)
        state = init_state(model, optimizer, config.seed, False, config.lora)
        _, metrics = jax.lax.scan(step, state, windows)
        return metrics["loss"]

    return [float(losses(jnp.float32(factor))[-50:].mean()) for factor in factors]


def test_what_the_user_set_is_left_alone(cpu, machine):
    changes = {"model.embed_dim": 96, "model.num_heads": 2, "model.dropout": 0.35}
    best, others, _ = find_best(cpu, 10, 10**6, {"model.embed_dim", "model.dropout"}, **changes)
    assert machine == [96] and not others
    assert (best.config.model.embed_dim, best.config.model.num_heads, best.config.model.dropout) == (96, 2, 0.35)
    assert best.config.optimizer.weight_decay == autotune.regularisation(best.passes).weight_decay


def test_a_size_that_does_not_fit_into_memory_is_not_chosen(cpu, machine, monkeypatch):
    fitting = autotune.measure_cost
    monkeypatch.setattr(
        autotune, "measure_cost", lambda c, *rest: fitting(c, *rest) if c.model.embed_dim < 256 else None
    )
    best, others, _ = find_best(cpu, 1000, 10**8)
    assert best.config.model.embed_dim == 192 and len(others) == 1


def test_too_little_time_is_one_line_with_a_remedy(cpu, machine):
    """What took the time is named; following the remedy trains."""
    config = build_config(minutes=0.1, precision="float32", **{"model.seq_len": 256, "batch_size": 8})
    spent = {"starting": 2.0, "preparing the text": 40.0, "nothing": 0.1}
    line = (
        r"minutes=0.1 must leave time to train, but 2 s into starting, 40 s into preparing the text.* went of it "
        r"before the first step; try --config.minutes=(\d+)$"
    )
    with pytest.raises(ValueError, match=line) as error:
        autotune.find_best(config, text(10**6), cpu, time.monotonic() + 6, (), spent)
    assert "\n" not in str(error.value) and "nothing" not in str(error.value)
    advised = re.search(line, str(error.value))
    assert advised and not find_best(cpu, int(advised[1]), 10**6)[2]


def test_with_time_for_few_steps_the_smallest_size_is_trained_and_that_is_said(cpu, machine, monkeypatch):
    """Where a busy machine took the time; whatever the sizes cost."""
    steps = []
    for seconds in range(4, 60, 4):
        try:
            best, _, note = find_best(cpu, seconds / 60, 10**6)
        except ValueError:
            assert not steps, "less time was enough"
            continue
        steps.append(best.config.total_steps)
        assert (steps[-1] < autotune.MIN_STEPS) == note.startswith(f"only {steps[-1]} steps fit into minutes=")
        if note:
            assert best.config.model.embed_dim == autotune.SHAPES[0][1] and "use --config.minutes=" in note
    assert steps == sorted(steps) and 0 < steps[0] < autotune.MIN_STEPS < steps[-1]


@pytest.mark.parametrize("name", ["total_steps", "passes"])
def test_a_length_beside_the_minutes_is_refused(cpu, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must not be given where minutes=3 decide it; leave out one"):
        train(build_config(minutes=3), tmp_path / "new", cpu, overrides={name})
    assert not (tmp_path / "new").exists()


def test_a_run_of_minutes_goes_on_with_what_was_decided(tmp_path, cpu, monkeypatch, capsys):
    """From text to the end; then the same command again, other minutes, and a setting of the user's."""
    small = {"corpus.num_train_tales": 1000, "corpus.num_valid_tales": 10, "corpus.num_test_tales": 10}
    small |= {"model.seq_len": 32, "evaluate.max_windows": 8, "sample.max_tokens": 8, "metrics.every_steps": 10}
    config = build_config(minutes=100, precision="float32", **small)
    monkeypatch.setattr(autotune, "SHAPES", ((1, 128),))
    monkeypatch.setattr(autotune, "measure_cost", lambda *args: StepCost(90.0, 1.0))
    outcome = train(config, tmp_path, cpu, {"sample.every_steps"})
    assert outcome.step == outcome.total_steps > autotune.MIN_STEPS
    saved = Config.load(tmp_path)
    assert (saved.minutes, saved.total_steps) == (100, outcome.total_steps)
    assert (saved.model.num_layers, saved.model.embed_dim, saved.model.num_heads) == (1, 128, 2)
    assert saved.tokenizer.vocab_size == 1024 and saved.sample.every_steps == config.sample.every_steps
    said = capsys.readouterr().err
    assert "vocabulary 1,024: 0.8 MB of text" in said and "1 layers of 128" in said and "tokens/s measured" in said
    log = (tmp_path / "log.txt").read_text()
    assert "vocabulary 1,024" in log and "dropout" in log
    monkeypatch.setattr(autotune, "find_best", None)  # nothing is decided twice
    assert train(config, tmp_path, cpu).step == outcome.step
    with pytest.raises(ValueError, match=r"minutes=50 must leave steps to take"):
        train(dataclasses.replace(config, minutes=50.0), tmp_path, cpu)
    with pytest.raises(ValueError, match=r"model.num_heads=4 must be 2 to go on with the experiment"):
        mine = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=4))
        train(mine, tmp_path, cpu, {"model.num_heads"})


def test_several_processes_are_refused(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    line = r"minutes=3 must be 0 where several processes train; set --config.passes=1 instead"
    with pytest.raises(ValueError, match=line):
        autotune.autotune(build_config(minutes=3), tmp_path / "new", cpu, time.monotonic())
    assert not (tmp_path / "new").exists()


def test_a_size_is_measured_by_real_steps_unless_it_does_not_fit(cpu, monkeypatch):
    config = build_config(precision="float32", **{"model.seq_len": 32})
    cost = autotune.measure_cost(config, cpu, jnp.dtype("float32"))
    assert cost.step_seconds > 0 and cost.compile_seconds > 0
    small = dataclasses.replace(cpu, memory=1000)
    monkeypatch.setattr(autotune, "time_steps", lambda *args: 1.0)
    assert autotune.measure_cost(config, small, jnp.dtype("float32")) is None
    ignored = dataclasses.replace(config, backend=dataclasses.replace(config.backend, ignore_memory=True))
    assert autotune.measure_cost(ignored, small, jnp.dtype("float32")).step_seconds == 1.0
