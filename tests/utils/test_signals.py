"""Real signals to a real process: the first asks it to stop, a second Ctrl-C ends it, and standing still is no time."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

PROGRAM = """
import sys, time
from tale_jax.utils.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    start, end = signals.clock(), time.perf_counter() + 60
    while not signals.number and time.perf_counter() < end:
        time.sleep(0.01)
    print(signals.number, round(signals.clock() - start, 1), flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
"""


def started(*arguments, ignore=()):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignore}  # as `nohup` does
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=env, stdout=-1, stderr=-1, text=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_first_signal_asks_to_stop(name):
    number = getattr(signal, name)
    process = started()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert stdout.split()[0] == str(int(number)) and process.returncode == 0
    assert "stops after this step and saves; Ctrl-C now quits at once" in stderr


def test_a_second_ctrl_c_ends_what_cannot_be_interrupted_and_a_second_hangup_does_not():
    process = started("wait")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().split()[0] == str(int(signal.SIGHUP))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "quit at once" in process.communicate()[1]


def test_a_hangup_that_is_ignored_stays_ignored():
    process = started(ignore=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].split()[0] == str(int(signal.SIGTERM))


def test_the_clock_stands_still_while_the_process_is_stopped():
    process = started()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    assert float(process.communicate(timeout=60)[0].split()[1]) < 2.5
