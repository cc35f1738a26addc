"""A run goes on by its workdir alone; another length changes its length and nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers import build_config, run_script

from tale_jax.config import Config, change
from tale_jax.runs.resume import resumed_config, steps_within


def make_run(workdir, steps_done=0, rate=0.0, **changes):
    """A workdir with the config of a run of 100 steps, as many checkpoints, and records of its speed."""
    config = build_config(**{"total_steps": 100, "evaluate.every_steps": 0} | changes).with_total_steps()
    config = change(config, {"sample.every_steps": 0})
    workdir.mkdir()
    config.save(workdir)
    if steps_done:
        (workdir / "checkpoints" / str(steps_done)).mkdir(parents=True)
    records = [{"kind": "train", "step": s, "tokens_per_second": rate} for s in range(1, 11)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records if rate))
    return Config.load(workdir)


def test_the_same_settings_are_kept_as_they_are(tmp_path):
    saved = make_run(tmp_path / "run")
    assert resumed_config(saved, tmp_path / "run") == (saved, "")


def test_a_longer_run_has_the_warmup_of_its_length_unless_one_was_given(tmp_path):
    saved = make_run(tmp_path / "run")
    longer, _ = resumed_config(change(saved, {"total_steps": 1000}), tmp_path / "run", {"total_steps"})
    assert longer.with_total_steps().schedule.warmup_steps == 20 and longer.total_steps == 1000
    given = change(saved, {"total_steps": 1000, "schedule.warmup_steps": 2})
    kept, _ = resumed_config(given, tmp_path / "run", {"total_steps", "schedule.warmup_steps"})
    assert kept.schedule.warmup_steps == 2
    assert longer.difference(saved) is None


def test_passes_that_are_given_decide_the_length():
    values = build_config(total_steps=100).to_config_dict()
    values.passes = 3.0
    assert Config.build(values, {"passes"}).with_total_steps(80).total_steps == 60  # 3 · 80 windows in batches of 4
    assert Config.build(values, {"passes", "total_steps"}).total_steps == 100
    assert Config.build(values).total_steps == 100


def test_more_minutes_are_more_steps_at_the_speed_of_the_run(tmp_path):
    saved = make_run(tmp_path / "run", 100, rate=4000.0, minutes=5.0)
    longer, note = resumed_config(change(saved, {"minutes": 15.0}), tmp_path / "run", {"minutes"})
    step_seconds = saved.tokens_per_step / 4000
    extra = longer.total_steps - 100
    assert 0.9 * 600 / step_seconds < extra < 600 / step_seconds  # this start takes some of the ten minutes
    assert note == f"minutes 5 → 15: {longer.total_steps:,} steps in place of 100"
    assert replace(longer, minutes=5.0, total_steps=100, schedule=saved.schedule) == saved


def test_less_minutes_end_a_run_earlier(tmp_path):
    saved = make_run(tmp_path / "run", 10, rate=800.0, minutes=5.0)
    assert steps_within(saved, tmp_path / "run", 60) > 50
    shorter, note = resumed_config(change(saved, {"minutes": 4.0}), tmp_path / "run", {"minutes"})
    assert 10 < shorter.total_steps < 100 and "minutes 5 → 4" in note
    with pytest.raises(ValueError, match=r"minutes=1 must leave steps to take, .* try --config.minutes=6, or leave it"):
        make_run(tmp_path / "done", 100, rate=800.0, minutes=5.0)
        resumed_config(change(saved, {"minutes": 1.0}), tmp_path / "done", {"minutes"})
    remedied, _ = resumed_config(change(saved, {"minutes": 6.0}), tmp_path / "done", {"minutes"})
    assert remedied.total_steps > 100


def test_a_run_without_a_record_of_its_speed_goes_by_what_was_planned(tmp_path):
    saved = make_run(tmp_path / "run", minutes=10.0)
    longer, _ = resumed_config(change(saved, {"minutes": 20.0}), tmp_path / "run", {"minutes"})
    assert 150 < longer.total_steps < 200


def test_steps_that_are_given_win_over_minutes(tmp_path):
    saved = make_run(tmp_path / "run", minutes=10.0)
    given, note = resumed_config(
        change(saved, {"minutes": 20.0, "total_steps": 7}), tmp_path / "run", {"minutes", "total_steps"}
    )
    assert given.total_steps == 7 and not note


def test_minutes_of_a_run_of_steps_are_refused_with_the_steps_that_they_are(tmp_path):
    saved = make_run(tmp_path / "run", 100, rate=4000.0)
    rule = r"minutes=2 must be 0 to go on .* set --config.total_steps=\d+ instead"
    with pytest.raises(ValueError, match=rule) as error:
        resumed_config(change(saved, {"minutes": 2.0}), tmp_path / "run", {"minutes"})
    steps = int(str(error.value).partition("total_steps=")[2].split()[0])
    remedied, _ = resumed_config(change(saved, {"total_steps": steps}), tmp_path / "run", {"total_steps"})
    assert remedied.total_steps == steps and steps > 100


@pytest.mark.slow
def test_the_script_goes_on_by_the_workdir_alone(trained, tmp_path):
    workdir = tmp_path / "a run: [1]"  # also a name that flags could trip over
    shutil.copytree(trained, workdir)
    done = run_script("train", f"--workdir={workdir}", cwd=tmp_path)
    assert done.returncode == 0 and "nothing was left to do" in done.stdout, done.stderr
    longer = done.stdout.partition("python launch/train.py ")[2]
    assert "--config.total_steps=40" in longer
    done = run_script("train", "--workdir", str(workdir), "--config.total_steps=22", cwd=tmp_path)
    assert done.returncode == 0 and "resumes at step 20" in done.stderr, done.stderr
    assert Config.load(workdir).total_steps == 22
    for flags, words in (
        (["--config.model.num_layers=3"], "model.num_layers=3 must be 2 to go on"),
        (["--config.modle.num_layers=3"], "did you mean --config.model.num_layers?"),
        (["--config.minutes=1"], "--config.total_steps="),
    ):
        done = run_script("train", f"--workdir={workdir}", *flags, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    (workdir / "config.json").write_text("{")
    done = run_script("train", f"--workdir={workdir}", cwd=tmp_path)
    assert done.returncode == 2 and "config.json must be JSON" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_script("train", f"--workdir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2 and "holds no run to go on with" in done.stderr and "--config=configs/" in done.stderr
