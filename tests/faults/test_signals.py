"""Signals at moments of a run: it saves, ends with 128 + the number, and goes on to the same bits."""

import signal

import pytest
from faults.processes import RECIPE, go_on, held, newest_digests, recorded_steps, run

from tale_jax.runs.verify import verify

pytestmark = pytest.mark.faults

SAVING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


@pytest.mark.parametrize("moment", ["stepping:5", "saving:9", "deleting:2"])
@pytest.mark.parametrize("name", SAVING)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(whole, tmp_path, name, moment):
    number, workdir = getattr(signal, name), tmp_path / "run"
    with held(moment, "train", *RECIPE, f"--workdir={workdir}") as process:
        code, _, stderr = go_on(process, number)
    assert code == 128 + number and "Traceback" not in stderr, stderr
    step, _, _ = newest_digests(workdir)
    assert step >= recorded_steps(workdir)[-1] and not verify(workdir).bad  # no step that was told is lost
    done = run("train", *RECIPE, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert newest_digests(workdir) == newest_digests(whole)


@pytest.mark.parametrize("moment", ["stepping:5", "saving:9"])
def test_a_second_ctrl_c_ends_at_once_and_nothing_saved_is_lost(whole, tmp_path, moment):
    workdir = tmp_path / "run"
    with held(moment, "train", *RECIPE, f"--workdir={workdir}") as process:
        code, _, stderr = go_on(process, signal.SIGINT, signal.SIGINT)
    assert code in (130, -signal.SIGINT) and "Traceback" not in stderr, stderr
    done = run("train", *RECIPE, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert newest_digests(workdir) == newest_digests(whole)


def test_sigquit_ends_at_once_and_nothing_saved_is_lost(whole, tmp_path):
    workdir = tmp_path / "run"
    with held("stepping:7", "train", *RECIPE, f"--workdir={workdir}") as process:
        code, _, _ = go_on(process, signal.SIGQUIT)
    assert code in (128 + signal.SIGQUIT, -signal.SIGQUIT)
    done = run("train", *RECIPE, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert newest_digests(workdir) == newest_digests(whole)
