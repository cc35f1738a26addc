"""What is saved comes back: exactly, on other devices, and with a clear line when it cannot."""

import concurrent.futures
import errno
import json
import os
import re
import shutil
import threading

import jax
import numpy as np
import pytest
from helpers import assert_trees_close, assert_trees_equal, take_steps, tiny_batches, tiny_trainer

from tale_jax.training import checkpoint as checkpoint_module
from tale_jax.training.checkpoint import Checkpoints, SavedParams, check_checkpoint, max_concurrent_bytes, num_bytes


def save(folder, keep, losses, **more):
    """Checkpoints at steps 1, 2, ... with these validation losses (None: not known)."""
    trainer = tiny_trainer()
    checkpoints, state = Checkpoints(folder, keep, **more), trainer.init()
    for step, loss in enumerate(losses, start=1):
        state = state.replace(step=state.step + 1)
        checkpoints.save(step, state, {"examples": 8 * step}, loss)
    checkpoints.close()
    return trainer, state


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_state_and_data_position_come_back_exactly(tmp_path):
    trainer, state = save(tmp_path, 2, [3.0])
    found, data = Checkpoints(tmp_path, 2).restore(trainer.abstract_state, trainer.state_shardings)
    assert_trees_equal(found, state)
    assert data == {"examples": 8}


def test_saved_in_the_foreground_with_little_memory_it_is_the_same_checkpoint(tmp_path):
    trainer = tiny_trainer()
    state = trainer.init()
    checkpoints = Checkpoints(tmp_path, 2, max_concurrent_bytes(trainer.abstract_state, overlap_io=False))
    checkpoints.save(1, state, {"examples": 8}, 3.0)
    assert kept(tmp_path) == [1]  # before anything waits for it
    checkpoints.close()
    found, data = Checkpoints(tmp_path, 2).restore(trainer.abstract_state, trainer.state_shardings)
    assert_trees_equal(found, state)
    assert data == {"examples": 8}


def test_saved_on_one_device_restored_on_eight_and_back(tmp_path):
    trainer, state = save(tmp_path / "one", 1, [None])
    eight = tiny_trainer(8, 2, 4)
    found, _ = Checkpoints(tmp_path / "one", 1).restore(eight.abstract_state, eight.state_shardings)
    assert_trees_equal(found, state)
    assert found.params["blocks"]["mlp"]["gate"]["kernel"].sharding.num_devices == 8
    again = Checkpoints(tmp_path / "eight", 1)
    again.save(1, found, {"examples": 8}, None)
    again.close()
    back, _ = Checkpoints(tmp_path / "eight", 1).restore(trainer.abstract_state, trainer.state_shardings)
    assert_trees_equal(back, state)


def test_keeps_the_newest_and_the_best(tmp_path):
    save(tmp_path, 2, [3.0, 1.0, 2.0, None, 2.5])
    assert kept(tmp_path) == [2, 4, 5]


def test_keeps_multiples_too(tmp_path):
    save(tmp_path, 1, [3.0, 2.0, 1.0, 4.0, 5.0, 6.0, 7.0], keep_every=2)
    assert kept(tmp_path) == [2, 3, 4, 6, 7]


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


def restored(folder, trainer):
    return Checkpoints(folder, 3).restore(trainer.abstract_state, trainer.state_shardings)


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_run_that_goes_on_from_a_checkpoint_takes_the_same_steps(tmp_path, name):
    """To the bit: weights, moments of the optimizer, moving average, step and dropout are all in it."""
    noisy = {"model.dropout": 0.2, "ema.decay": 0.9, "optimizer.name": name, "optimizer.normuon_beta": 0.0}
    trainer, windows = tiny_trainer(**noisy), tiny_batches(4)
    state, _ = take_steps(trainer, 2)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(2, state, {"examples": 16}, None)
    checkpoints.close()
    other, _ = restored(tmp_path, trainer)
    for batch in windows[2:]:
        state, metrics = trainer.step(state, trainer.place(batch))
        other, other_metrics = trainer.step(other, trainer.place(batch))
        assert_trees_equal(other_metrics, metrics)
    assert_trees_equal(other, state)


def test_the_moving_average_has_an_item_where_there_is_one(tmp_path):
    trainer = tiny_trainer(**{"ema.decay": 0.9, "optimizer.learning_rate": 1e-2})
    state, _ = take_steps(trainer, 2)
    checkpoints = Checkpoints(tmp_path / "on", 3)
    checkpoints.save(2, state, {}, None)
    checkpoints.close()
    assert_trees_equal(restored(tmp_path / "on", trainer)[0], state)
    assert (tmp_path / "on" / "checkpoints" / "2" / "ema").is_dir()
    save(tmp_path / "off", 1, [1.0])
    assert not (tmp_path / "off" / "checkpoints" / "1" / "ema").exists()


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    trainer = tiny_trainer()
    with pytest.raises(ValueError, match="must hold a checkpoint; train first"):
        restored(tmp_path, trainer)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, capsys):
    trainer, _ = save(tmp_path, 2, [2.0, 1.0])
    file = next((tmp_path / "checkpoints" / "2" / "training").rglob("_METADATA"))
    file.write_bytes(b"")
    assert restored(tmp_path, trainer)[1] == {"examples": 8}
    said = capsys.readouterr().err
    assert "checkpoint 2 is not used: training/_METADATA has 0 bytes instead of" in said and said.count("\n") == 1
    assert (tmp_path / "damaged" / "2").is_dir() and kept(tmp_path) == [1]


def every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_bit_of_any_file_is_found(tmp_path):
    save(tmp_path, 2, [2.0])
    folder = tmp_path / "checkpoints"
    for file in every_file(folder / "1"):
        content = bytearray(file.read_bytes())
        if content:
            content[len(content) // 2] ^= 1
            whole = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(file.name)):
                check_checkpoint(folder, 1)
            file.write_bytes(whole)
    assert check_checkpoint(folder, 1)["step"] == 1


def test_parts_of_other_steps_do_not_fit(tmp_path):
    """Neither an item nor the whole folder of another step."""
    save(tmp_path, 3, [3.0, 2.0])
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "3")
    with pytest.raises(ValueError, match="its manifest is of step 1"):
        check_checkpoint(folder, 3)
    shutil.rmtree(folder / "2" / "training")
    shutil.copytree(folder / "1" / "training", folder / "2" / "training")
    with pytest.raises(ValueError, match="training"):
        check_checkpoint(folder, 2)


def test_what_a_kill_left_is_removed(tmp_path):
    trainer, _ = save(tmp_path, 3, [3.0, 2.0])
    folder = tmp_path / "checkpoints"
    (folder / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "2" / "manifest.json").unlink()
    (folder / ".saving").write_text("2")  # killed between the last array and the manifest
    assert restored(tmp_path, trainer)[1] == {"examples": 8}
    assert kept(tmp_path) == [1] and not (tmp_path / "damaged").exists()


def as_before(folder, step):
    """Makes a checkpoint what versions without manifests wrote."""
    (folder / str(step) / "manifest.json").unlink()
    (folder / str(step) / "meta").mkdir()
    (folder / str(step) / "meta" / "metadata").write_text(json.dumps({"step": step, "nats_per_token": 2.5}))


def test_a_checkpoint_of_before_is_taken_once_and_given_a_manifest(tmp_path, capsys):
    _, state = save(tmp_path, 2, [1.0])
    as_before(tmp_path / "checkpoints", 1)
    with SavedParams(tmp_path) as saved:
        assert saved.by_loss() == [1]
    assert "checkpoint 1 has no digests" in capsys.readouterr().err
    assert Checkpoints(tmp_path, 2).latest == 1
    assert "checkpoint 1 had no digests" in capsys.readouterr().err
    assert Checkpoints(tmp_path, 2).latest == 1 and not capsys.readouterr().err
    with SavedParams(tmp_path) as saved:
        assert_trees_equal(saved.load([1], jax.tree_util.tree_map(lambda x: x, state.params)), state.params)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    _, state = save(tmp_path, 2, [1.0])
    checkpoints = Checkpoints(tmp_path, 2, facts={"settings": {"optimizer": {"learning_rate": 3e-3}}})
    bad = state.replace(params=state.params | {"embedding": state.params["embedding"].at[3, 4].set(np.inf)})
    with pytest.raises(
        ValueError, match=r"params\.embedding is not finite at step 2, so nothing of it is saved"
    ) as error:
        checkpoints.save(2, bad, {}, None)
    assert str(error.value).endswith(
        "checkpoint 1 is whole; go on from there with --config.optimizer.learning_rate=0.0015"
    )
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1"]
    checkpoints.close()
    assert kept(tmp_path) == [1]


def test_a_disk_that_reads_other_numbers_is_found_at_the_first_save(tmp_path, monkeypatch):
    trainer = tiny_trainer()
    checkpoints, original = Checkpoints(tmp_path, 2), checkpoint_module._restore

    def wrong(*arguments):
        return {name: jax.tree_util.tree_map(lambda x: x * 2, tree) for name, tree in original(*arguments).items()}

    monkeypatch.setattr(checkpoint_module, "_restore", wrong)
    with pytest.raises(OSError, match=r"what was saved is not what is read again"):
        checkpoints.save(1, trainer.init(), {}, None)


def test_a_disk_that_refuses_is_one_line_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    trainer, state = save(tmp_path, 2, [2.0])
    checkpoints = Checkpoints(tmp_path, 2, max_concurrent_bytes(trainer.abstract_state, overlap_io=False))

    def refuse(*arguments, **keywords):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoints._manager, "save", refuse)
    with pytest.raises(OSError, match=r"the checkpoint could not be written \(the disk is full; make room"):
        checkpoints.save(2, state, {"examples": 16}, None)
    monkeypatch.undo()
    checkpoints.close()
    assert restored(tmp_path, trainer)[1] == {"examples": 8}


def test_a_save_that_fails_in_the_background_is_told_at_the_next_step(tmp_path, monkeypatch):
    trainer = tiny_trainer()
    checkpoints, state, may_fail = Checkpoints(tmp_path, 2), trainer.init(), threading.Event()
    checkpoints.save(1, state, {"examples": 8}, None)

    finish = checkpoints._manager.wait_until_finished

    def fail():
        finish()  # nothing writes any more
        if threading.current_thread() is threading.main_thread():  # orbax asks for it before it saves
            return
        may_fail.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    checkpoints.save(2, state, {"examples": 16}, None)
    checkpoints.poll()  # does not wait for it
    may_fail.set()
    concurrent.futures.wait([checkpoints._sealing])
    with pytest.raises(OSError, match=r"the checkpoint could not be written \(the disk is full; make room"):
        checkpoints.poll()
    monkeypatch.undo()
    checkpoints.close()
    assert restored(tmp_path, trainer)[1] == {"examples": 8}


def test_room_for_all_that_is_kept_and_one_more_is_looked_for_at_the_start(tmp_path, monkeypatch):
    state, checkpoints = tiny_trainer().abstract_state, Checkpoints(tmp_path, keep=2)
    needed = 3 * num_bytes(state)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    checkpoints.check_space(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"are needed and .* are free: the disk is full; make room, or keep fewer"):
        checkpoints.check_space(state)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)  # what is there already need not fit again
    (tmp_path / "checkpoints" / "7" / "file").write_bytes(b"0")
    checkpoints.check_space(state)
    checkpoints.close()


def test_saved_weights_are_read_alone_and_averaged(tmp_path):
    trainer = tiny_trainer(**{"ema.decay": 0.9, "optimizer.learning_rate": 1e-2})
    checkpoints, states = Checkpoints(tmp_path, 3), {step: take_steps(trainer, step)[0] for step in (1, 2, 3)}
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0)):
        checkpoints.save(step, states[step], {}, loss)
    checkpoints.close()
    with SavedParams(tmp_path) as saved:
        assert saved.steps == [1, 2, 3] and saved.by_loss()[0] == 2 and saved.has_ema(2)
        shapes = trainer.abstract_state.params
        assert_trees_equal(saved.load([3], shapes), states[3].params)
        assert_trees_equal(saved.load([3], shapes, ema=True), states[3].ema_params)
        middle = jax.tree_util.tree_map(lambda a, b: (a + b) / 2, states[1].params, states[3].params)
        assert_trees_close(saved.load([1, 3], shapes), middle, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("losses", [[None, None], [None, 2.0], [2.0, None], [np.inf, 3.0]])
def test_the_best_is_by_known_losses_and_else_the_newest(tmp_path, losses):
    save(tmp_path, 2, losses)
    with SavedParams(tmp_path) as saved:
        assert saved.by_loss()[0] == (1 if losses == [2.0, None] else 2)


def test_a_folder_without_checkpoints_has_no_steps(tmp_path):
    assert SavedParams(tmp_path).steps == []
    (tmp_path / "checkpoints" / "5.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "007").mkdir()
    assert SavedParams(tmp_path).steps == []


def test_writing_is_bounded_where_steps_wait_for_it():
    state = {"a": np.zeros((40 << 20) // 4, np.float32)}
    assert max_concurrent_bytes(state, overlap_io=True) == 0
    assert max_concurrent_bytes(state, overlap_io=False) == 2 * (40 << 20)
    assert max_concurrent_bytes({"a": np.zeros(3, np.float32)}, overlap_io=False) == 32 << 20
