"""A workdir opened again: the weights asked for, or one line that says what there is."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from helpers import SEQ_LEN, assert_trees_close, assert_trees_equal, build_config, take_steps, tiny_trainer

from tale_jax.config import Config, change
from tale_jax.data.token_files import load_manifest
from tale_jax.runs.experiment import open_experiment
from tale_jax.training.checkpoint import Checkpoints

SHAPE = {
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.seq_len": SEQ_LEN,
    "tokenizer.vocab_size": build_config().tokenizer.vocab_size,  # of the tokenizer that it is opened with
    "tokenizer.path": "",
    "ema.decay": 0.9,
}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, trained):
    """A workdir with three checkpoints and moving averages, of which the second is the best; and their states."""
    workdir = tmp_path_factory.mktemp("averaged")
    trainer = tiny_trainer(**SHAPE, **{"optimizer.learning_rate": 1e-2})
    checkpoints, states = Checkpoints(workdir, 3), {step: take_steps(trainer, step)[0] for step in (1, 2, 3)}
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0)):
        checkpoints.save(step, states[step], {}, loss)
    checkpoints.close()
    build_config(**SHAPE).save(workdir)
    shutil.copytree(trained / "tokenizer", workdir / "tokenizer")
    return workdir, states


@pytest.mark.parametrize(
    ("weights", "step", "kind", "found_step"),
    [
        ("auto", 0, "ema", 2),
        ("ema", 0, "ema", 2),
        ("last", 0, "last", 2),
        ("last", 3, "last", 3),
        ("mean:1", 0, "mean:1", 3),
    ],
)
def test_the_weights_asked_for(averaged, cpu, weights, step, kind, found_step):
    """Of the best checkpoint, where no step is named; a mean is over the newest."""
    workdir, states = averaged
    opened = open_experiment(workdir, cpu, step=step, weights=weights)
    assert (opened.step, opened.weights) == (found_step, kind)
    state = states[found_step]
    assert_trees_equal(opened.params, state.ema_params if kind == "ema" else state.params)


def test_a_mean_is_over_the_checkpoints_up_to_a_step(averaged, cpu):
    workdir, states = averaged
    for step, of in ((2, (1, 2)), (0, (2, 3))):
        opened = open_experiment(workdir, cpu, step=step, weights="mean:2")
        assert (opened.step, opened.weights) == (of[-1], "mean:2")
        middle = jax.tree_util.tree_map(lambda a, b: (a + b) / 2, *(states[each].params for each in of))
        assert_trees_close(opened.params, middle, rtol=1e-6, atol=1e-8)


def test_it_is_said_which_checkpoint_is_taken_where_it_is_not_the_last(averaged, trained, cpu, capsys):
    workdir, _ = averaged
    assert open_experiment(workdir, cpu).step == 2
    said = capsys.readouterr().err
    assert "note: checkpoint of step 2, the best by validation loss; the last is of step 3" in said
    open_experiment(workdir, cpu, step=2)
    open_experiment(workdir, cpu, weights="mean:2")
    open_experiment(trained, cpu)
    assert "best by validation" not in capsys.readouterr().err


def test_the_best_or_the_step_asked_for(trained, cpu):
    assert open_experiment(trained, cpu).step == 20
    assert open_experiment(trained, cpu, step=10).step == 10
    with pytest.raises(ValueError, match=r"step=7 must be a whole checkpoint of .*; there is 10, 20"):
        open_experiment(trained, cpu, step=7)


def test_the_model_computes_as_asked_and_recomputes_nothing(trained, tmp_path, cpu):
    shutil.copytree(trained, tmp_path / "run")
    build_config(remat="block").save(tmp_path / "run")
    opened = open_experiment(tmp_path / "run", cpu, dtype=jnp.bfloat16)
    assert (opened.model.dtype, opened.model.remat) == (jnp.bfloat16, "none")
    assert opened.model.materialize_transposes is cpu.materialize_transposes
    assert opened.params["embedding"].dtype == jnp.float32


def test_auto_takes_the_last_where_no_average_is_kept(trained, cpu):
    opened = open_experiment(trained, cpu)
    assert opened.weights == "last"
    assert_trees_equal(opened.params, open_experiment(trained, cpu, weights="last").params)


def test_what_is_no_experiment_or_has_no_checkpoint_is_refused(trained, tmp_path, cpu):
    with pytest.raises(ValueError, match="must hold an experiment"):
        open_experiment(tmp_path, cpu)
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        open_experiment(tmp_path, cpu)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoint that is whole \(in .*: 5: manifest.json is missing\)") as error:
        open_experiment(tmp_path, cpu)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_number(trained, tmp_path, cpu, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    file = next((workdir / "checkpoints" / "20" / "params").rglob("d/*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert open_experiment(workdir, cpu).step == 10
    assert f"checkpoint 20 is not used: params/{file.relative_to(workdir / 'checkpoints/20/params')} is damaged" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"checkpoint 20 of .* is damaged: params/.*; try --step=10"):
        open_experiment(workdir, cpu, step=20)


def test_a_tokenizer_settings_or_windows_of_another_run_are_refused(trained, tmp_path, cpu):
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    whole = config.read_bytes()
    change(Config.load(trained), {"model.rope_base": 500.0}).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model.rope_base=500.0 must be 10000.0, as in checkpoint 20"):
        open_experiment(tmp_path / "run", cpu)
    config.write_bytes(whole)
    file = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"belongs to another tokenizer|must be a SentencePiece model"):
        open_experiment(tmp_path / "run", cpu)
    opened, manifest = open_experiment(trained, cpu), load_manifest(trained, "valid")
    opened.check_windows(manifest)
    with pytest.raises(ValueError, match=r"belongs to other valid windows"):
        opened.check_windows(dataclasses.replace(manifest, sha256="0" * 64))
    opened.check_windows(dataclasses.replace(manifest, sha256="0" * 64, replaced=[{"sha256": manifest.sha256}]))


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ("ema", r"weights=ema must be what the run kept; there is last, and mean:K"),
        ("mean:3", r"weights=mean:3 must .* there is last, and mean:K of the 2 checkpoints up to step 20"),
        ("mean:0", r"weights=mean:0 must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2"),
        ("best", r"weights=best must be auto, last, ema, or mean:K"),
    ],
)
def test_weights_that_are_not_there_are_refused_in_one_line(trained, cpu, weights, line):
    with pytest.raises(ValueError, match=line) as error:
        open_experiment(trained, cpu, weights=weights)
    assert "\n" not in str(error.value)
