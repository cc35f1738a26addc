"""What minutes decide: each rule by itself, the choice on a machine of known speed, and a run from command to end."""

import collections
import dataclasses
import json
import math
import time
from types import SimpleNamespace

import pytest
from helpers import build_config

from tale_jax.config import Config
from tale_jax.data.prepare import suitable_vocab_size, with_vocab_size
from tale_jax.planning import autotune as budget
from tale_jax.runs.train import train

ENGLISH = collections.Counter({chr(97 + i): 1000 for i in range(26)})


def text(num_bytes):
    """What a search reads of prepared text."""
    return SimpleNamespace(manifests={"train": SimpleNamespace(bytes=num_bytes, tokens=num_bytes // 4)})


@pytest.fixture
def machine(monkeypatch):
    """A machine of 300 GFLOP/s on which nothing has to be compiled; the sizes it was asked to measure."""
    asked = []

    def measure(config, backend, dtype):
        asked.append(config.model.embed_dim)
        return budget.step_flops(config) / 3e11, 5.0

    monkeypatch.setattr(budget, "_measure", measure)
    monkeypatch.setattr(budget, "matmul_peak", lambda dtype: 1e12)
    return asked


def find_best(cpu, minutes, num_bytes, given=(), **changes):
    config = build_config(minutes=minutes, precision="float32", **{"model.seq_len": 256, "batch_size": 8} | changes)
    return budget.find_best(config, text(num_bytes), cpu, time.monotonic() + 60 * minutes, overrides)


def test_the_vocabulary_grows_with_the_text():
    sizes = [suitable_vocab_size(10**n, ENGLISH) for n in range(3, 12)]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (512, 8192)
    assert (suitable_vocab_size(10**6, ENGLISH), suitable_vocab_size(5 * 10**6, ENGLISH)) == (1024, 2048)
    many = collections.Counter({chr(0x4E00 + i): 100 for i in range(3000)})
    assert suitable_vocab_size(10**6, many) == 8192
    assert suitable_vocab_size(10**6, ENGLISH | collections.Counter("éüñ")) == 1024  # too rare for pieces of their own


def test_the_vocabulary_of_a_corpus_is_that_of_its_training_text(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Chapter {n}. A fox went over hill {n}.\n\n" for n in range(40_000)))
    config = build_config(**{"corpus.name": "files", "corpus.path": str(tmp_path)})
    found, reason = with_vocab_size(config)
    assert found.tokenizer.vocab_size == 1024 and reason == "vocabulary 1,024: 1.6 MB of text"
    mine = build_config(**{"tokenizer.path": "mine.model", "corpus.name": "files", "corpus.path": str(tmp_path)})
    assert with_vocab_size(mine)[0] == mine


def test_the_law_wants_more_weights_and_more_text_and_new_text_more_than_old():
    assert budget.predict(2e6, 1e7, 1e7) < budget.predict(1e6, 1e7, 1e7)
    losses = [budget.predict(2e6, passes * 1e6, 1e6) for passes in (0.5, 1, 2, 8, 64)]
    assert losses == sorted(losses, reverse=True)
    assert budget.predict(2e6, 8e6, 8e6) < losses[3] - 0.01
    assert budget.predict(1e30, 1e30, 1e30) == pytest.approx(budget.FLOOR)


def test_text_that_is_read_often_is_regularised_more():
    found = [budget.regularisation(passes) for passes in (0.5, 2, 2.1, 9, 13, 1000)]
    assert found == sorted(found) and found[0][0] == 0 < found[2][0] < found[-1][0]


def test_steps_fit_into_the_time_with_all_that_is_none():
    config = build_config()
    counts = [budget.count_steps(config, left, 0.1, 5.0) for left in (-10, 0, 10, 60, 120)]
    assert counts[:2] == [0, 0] and counts == sorted(counts) and 0 < counts[3] < 600
    assert counts[4] - counts[3] == pytest.approx(60 / 0.1 / (1 + budget.MARGIN), abs=1)
    assert budget.count_steps(config, 60, 0.1, 9.0) < counts[3]


def test_more_minutes_never_choose_a_smaller_model(cpu, machine):
    for num_bytes in (10**6, 5 * 10**6, 10**8):
        widths = [find_best(cpu, minutes, num_bytes)[0].config.model.embed_dim for minutes in (3, 10, 30, 100, 1000)]
        assert widths == sorted(widths) and widths[-1] > widths[0]


def test_the_chosen_size_was_measured_and_is_the_best(cpu, machine):
    best, others = find_best(cpu, 10, 5 * 10**6)
    assert best.config.model.embed_dim in machine and len(machine) <= budget.TRIALS
    assert len(others) == len(budget.SHAPES) - 1 and all(best.bits <= run.bits for run in others)
    config = best.config
    assert config.model.embed_dim == 64 * config.model.num_heads and config.model.mlp_dim > config.model.embed_dim
    assert 0.8 * 600 < config.total_steps * best.seconds < 600
    assert best.passes == pytest.approx(config.total_steps * config.tokens_per_step / (5 * 10**6 / 4))
    assert (config.model.dropout, config.optimizer.weight_decay) == budget.regularisation(best.passes)
    assert math.ceil(config.total_steps / config.evaluate.every_steps) == budget.num_stops(10) == 5
    assert config.evaluate.every_steps == config.checkpoint.every_steps == config.sample.every_steps
    lines = budget.explain(best, others, text(5 * 10**6))
    assert f"layers of {config.model.embed_dim}" in lines[0] and "would make" in lines[0] and "dropout" in lines[1]


def test_what_the_user_gave_is_left_alone(cpu, machine):
    changes = {"model.embed_dim": 96, "model.num_heads": 2, "model.dropout": 0.35}
    best, others = find_best(cpu, 10, 10**6, {"model.embed_dim", "model.dropout"}, **changes)
    assert machine == [96] and not others
    assert (best.config.model.embed_dim, best.config.model.num_heads, best.config.model.dropout) == (96, 2, 0.35)
    assert best.config.optimizer.weight_decay == budget.regularisation(best.passes)[1]


def test_a_size_that_does_not_fit_into_memory_is_not_chosen(cpu, machine, monkeypatch):
    fitting = budget._measure
    monkeypatch.setattr(budget, "_measure", lambda c, *rest: fitting(c, *rest) if c.model.embed_dim < 256 else None)
    best, others = find_best(cpu, 1000, 10**8)
    assert best.config.model.embed_dim == 192 and len(others) == 1


def test_too_little_time_is_one_line_with_a_remedy(cpu, machine):
    with pytest.raises(ValueError, match=r"minutes=0.1 must leave time to train, but .* try minutes=\d") as error:
        find_best(cpu, 0.1, 10**6)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["total_steps", "passes"])
def test_a_length_beside_the_minutes_is_refused(cpu, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must not be given where minutes=3 decide it; leave out one"):
        train(build_config(minutes=3), tmp_path / "new", cpu, given={name})
    assert not (tmp_path / "new").exists()


def test_a_run_of_minutes_goes_on_with_what_was_decided(tmp_path, cpu, monkeypatch, capsys):
    """From text to the end; then the same command again, other minutes, and a setting of the user's."""
    small = {"corpus.num_train_tales": 1000, "corpus.num_valid_tales": 10, "corpus.num_test_tales": 10}
    small |= {"model.seq_len": 32, "evaluate.max_windows": 8, "sample.max_tokens": 8, "metrics.every_steps": 10}
    config = build_config(minutes=100, precision="float32", **small)
    monkeypatch.setattr(budget, "SHAPES", ((1, 128),))
    monkeypatch.setattr(budget, "_measure", lambda *a: (90.0, 1.0))
    outcome = train(config, tmp_path, cpu, {"sample.every_steps"})
    assert outcome.step == outcome.total_steps > budget.MIN_STEPS
    saved = Config.load(tmp_path)
    assert (saved.minutes, saved.total_steps) == (100, outcome.total_steps)
    assert (saved.model.num_layers, saved.model.embed_dim, saved.model.num_heads) == (1, 128, 2)
    assert saved.tokenizer.vocab_size == 1024 and saved.sample.every_steps == config.sample.every_steps
    said = capsys.readouterr().err
    assert "vocabulary 1,024: 0.8 MB of text" in said and "1 layers of 128" in said and "tokens/s measured" in said
    log = (tmp_path / "log.txt").read_text()
    assert "vocabulary 1,024" in log and "dropout" in log
    monkeypatch.setattr(budget, "search", None)  # nothing is decided twice
    assert train(config, tmp_path, cpu).step == outcome.step
    with pytest.raises(ValueError, match=r"minutes=50.0 must be 100.0 to go on with the experiment"):
        train(dataclasses.replace(config, minutes=50.0), tmp_path, cpu)
    with pytest.raises(ValueError, match=r"model.num_heads=4 must be 2 to go on with the experiment"):
        mine = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=4))
        train(mine, tmp_path, cpu, {"model.num_heads"})
    values = json.loads((tmp_path / "config.json").read_text())
    del values["minutes"]  # of a workdir that is older than the setting
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Config.load(tmp_path).minutes == 0
