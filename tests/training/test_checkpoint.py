"""What is saved comes back: exactly, on other devices, and with a clear line when it cannot."""

import shutil

import jax
import numpy as np
import pytest
from helpers import build_config
from test_training import batches, make_trainer

from tale_jax.runs.experiment import open_experiment
from tale_jax.training.checkpoint import Checkpoints, max_concurrent_bytes


def leaves_equal(a, b):
    jax.tree_util.tree_map(np.testing.assert_array_equal, a, b)


def save(folder, keep, losses):
    """Checkpoints at steps 1, 2, ... with these validation losses (None: not known)."""
    trainer = make_trainer()
    checkpoints, state = Checkpoints(folder, keep), trainer.init()
    for step, loss in enumerate(losses, start=1):
        state = state.replace(step=state.step + 1)
        checkpoints.save(step, state, {"examples": 8 * step}, loss)
    checkpoints.close()
    return trainer, state


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_state_and_data_position_come_back_exactly(tmp_path):
    trainer, state = save(tmp_path, 2, [3.0])
    found, data = Checkpoints(tmp_path, 2).restore(trainer.abstract_state, trainer.state_shardings)
    leaves_equal(found, state)
    assert data == {"examples": 8}


def test_saved_in_the_foreground_with_little_memory_it_is_the_same_checkpoint(tmp_path):
    trainer = make_trainer()
    state = trainer.init()
    checkpoints = Checkpoints(tmp_path, 2, max_concurrent_bytes(trainer.abstract_state, overlap_io=False))
    checkpoints.save(1, state, {"examples": 8}, 3.0)
    assert kept(tmp_path) == [1]  # before anything waits for it
    checkpoints.close()
    found, data = Checkpoints(tmp_path, 2).restore(trainer.abstract_state, trainer.state_shardings)
    leaves_equal(found, state)
    assert data == {"examples": 8}


def test_saved_on_one_device_restored_on_eight_and_back(tmp_path):
    trainer, state = save(tmp_path / "one", 1, [None])
    eight = make_trainer(8, 2, 4)
    found, _ = Checkpoints(tmp_path / "one", 1).restore(eight.abstract_state, eight.state_shardings)
    leaves_equal(found, state)
    assert found.params["blocks"]["mlp"]["gate"]["kernel"].sharding.num_devices == 8
    again = Checkpoints(tmp_path / "eight", 1)
    again.save(1, found, {"examples": 8}, None)
    again.close()
    back, _ = Checkpoints(tmp_path / "eight", 1).restore(trainer.abstract_state, trainer.state_shardings)
    leaves_equal(back, state)


def test_keeps_the_newest_and_the_best(tmp_path):
    save(tmp_path, 2, [3.0, 1.0, 2.0, None, 2.5])
    assert kept(tmp_path) == [2, 4, 5]


def test_the_best_is_known_after_a_restart(tmp_path):
    _, state = save(tmp_path, 1, [1.0, 2.0])
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, state, {}, 3.0)
    checkpoints.close()
    assert kept(tmp_path) == [1, 3]


def test_a_step_saved_twice_is_saved_once(tmp_path):
    trainer, state = save(tmp_path, 2, [1.0])
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, state, {"examples": 999}, 0.5)
    checkpoints.close()
    assert Checkpoints(tmp_path, 2).restore(trainer.abstract_state, trainer.state_shardings)[1] == {"examples": 8}


def test_open_experiment_gives_the_best_or_the_step_asked_for(trained):
    assert open_experiment(trained).step == 20
    assert open_experiment(trained, step=10).step == 10
    with pytest.raises(ValueError, match=r"step=7 must be a checkpoint of .*; there is 10, 20"):
        open_experiment(trained, step=7)


def test_what_is_no_experiment_or_has_no_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="must hold an experiment"):
        open_experiment(tmp_path)
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        open_experiment(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"5 is not a checkpoint that can be read") as error:
        open_experiment(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_names_the_one_to_go_on_from(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for file in (workdir / "checkpoints" / "20" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"remove that folder to go on from step 10"):
        open_experiment(workdir, step=20)


def saved_runs(tmp_path, decay):
    """A run of three steps without a tokenizer of its own; returns its states."""
    trainer = make_trainer(**{"ema.decay": decay, "optimizer.learning_rate": 1e-2})
    checkpoints, state, states = Checkpoints(tmp_path, 3), trainer.init(), {}
    for step, windows in enumerate(batches(3), start=1):
        state, _ = trainer.step(state, trainer.place(windows))
        states[step] = state
        checkpoints.save(step, state, {}, 1.0 / step if step < 3 else 9.0)
    checkpoints.close()
    build_config(**SHAPE, **{"ema.decay": decay}).save(tmp_path)
    return trainer, states


SHAPE = {"model.embed_dim": 32, "model.num_heads": 4, "model.seq_len": 16, "tokenizer.vocab_size": 512}


@pytest.fixture
def untokenized(monkeypatch):
    """The trainers of these tests have 64 ids; no tokenizer is so small."""
    from tale_jax.model.transformer import Transformer
    from tale_jax.training import checkpoint

    monkeypatch.setattr(checkpoint, "Transformer", lambda config, _, *rest: Transformer(config, 64, *rest))
    monkeypatch.setattr(checkpoint.Tokenizer, "load", lambda path: None)


def test_a_state_with_an_average_comes_back_and_one_without_has_no_item(tmp_path):
    trainer, states = saved_runs(tmp_path / "on", 0.9)
    found, _ = Checkpoints(tmp_path / "on", 3).restore(trainer.abstract_state, trainer.state_shardings)
    leaves_equal(found, states[3])
    assert (tmp_path / "on" / "checkpoints" / "3" / "average").is_dir()
    save(tmp_path / "off", 1, [1.0])
    assert not (tmp_path / "off" / "checkpoints" / "1" / "average").exists()


def test_the_weights_asked_for(tmp_path, untokenized):
    _, states = saved_runs(tmp_path, 0.9)
    for weights, step, kind, wanted in (
        ("auto", 2, "ema", states[2].ema_params),
        ("ema", 2, "ema", states[2].ema_params),
        ("last", 2, "last", states[2].params),
        ("mean:1", 3, "mean:1", states[3].params),
    ):
        opened = open_experiment(tmp_path, weights=weights)
        assert (opened.step, opened.weights) == (step, kind)  # step 2 is the best
        leaves_equal(opened.params, wanted)
    opened = open_experiment(tmp_path, step=2, weights="mean:2")
    assert (opened.step, opened.weights) == (2, "mean:2")
    middle = jax.tree_util.tree_map(lambda a, b: (a + b) / 2, states[1].params, states[2].params)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), opened.params, middle)


def test_auto_takes_the_last_where_no_average_is_kept(trained):
    opened = open_experiment(trained)
    assert opened.weights == "last"
    leaves_equal(opened.params, open_experiment(trained, weights="last").params)


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ("ema", r"weights=ema must be what the run kept; there is last, and mean:K"),
        ("mean:3", r"weights=mean:3 must .* there is last, and mean:K of the 2 checkpoints up to step 20"),
        ("mean:0", r"weights=mean:0 must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2"),
        ("best", r"weights=best must be auto, last, ema, or mean:K"),
    ],
)
def test_weights_that_are_not_there_are_refused_in_one_line(trained, weights, line):
    with pytest.raises(ValueError, match=line) as error:
        open_experiment(trained, weights=weights)
    assert "\n" not in str(error.value)
