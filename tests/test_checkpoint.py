"""What is saved comes back: exactly, on other devices, and with a clear line when it cannot."""

import shutil

import jax
import numpy as np
import pytest
from test_training import make_trainer

from tale_jax.checkpoint import Checkpoints, bytes_at_once, open_experiment


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
    checkpoints = Checkpoints(tmp_path, 2, bytes_at_once(trainer.abstract_state))
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
