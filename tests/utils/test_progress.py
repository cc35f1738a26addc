"""Progress is plain lines in a log, a bar on a terminal, and never on standard output."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from tale_jax.utils import progress as progress_module
from tale_jax.utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress):
    with progress:
        for step in range(1, 31):
            progress.advance()
            if step % 10 == 0:
                progress.set_fields({"kind": "train", "loss": 3.2, "learning_rate": 1e-3, "tokens_per_second": 9100.4})
            if step == 15:
                with progress.part("valid", total=2) as part:
                    part.advance(2)
                progress.print("a \x1b[31msample\x07")


def test_a_log_gets_plain_lines(capsys, tmp_path):
    run(Progress("train", total=30, log=tmp_path / "new" / "log.txt", every_seconds=0.0))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(char.isprintable() or char == "\n" for char in captured.err)
    lines = captured.err.splitlines()
    assert lines[0] == "train 1/30 steps (3%)"
    assert lines[-1].startswith("train 30/30 steps (100%)  loss 3.200  9,100 tokens/s  lr 1.0e-03")
    assert "a \N{REPLACEMENT CHARACTER}[31msample\N{REPLACEMENT CHARACTER}" in lines
    logged = (tmp_path / "new" / "log.txt").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in logged] == lines


def test_lines_are_rare(capsys):
    run(Progress("train", total=30, every_seconds=1000.0))
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("train")] == [
        "train 1/30 steps (3%)",
        "train 30/30 steps (100%)",
    ]


def test_a_terminal_gets_a_bar_and_the_log_stays_plain(monkeypatch, tmp_path, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    run(Progress("train", total=30, log=tmp_path / "log.txt", every_seconds=0.0))
    drawn = terminal.getvalue()
    assert "\x1b[" in drawn
    assert "30/30 steps (100%)  loss 3.200" in drawn
    assert "\x1b[31msample" not in drawn
    assert "\x1b" not in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out == ""


def test_bytes_are_shown_as_megabytes(capsys):
    with Progress("prepare", total=5_000_000, unit="bytes") as progress:
        progress.advance(5_000_000)
    assert capsys.readouterr().err.splitlines()[-1].startswith("prepare 5.0/5.0 MB (100%)")


def test_an_unknown_total_and_a_quiet_one(capsys, tmp_path):
    with Progress("sample", unit="tokens") as progress:
        progress.advance(7)
    assert capsys.readouterr().err.startswith("sample 7 tokens")
    run(Progress("train", total=30, log=tmp_path / "log.txt", show=False))
    assert capsys.readouterr().err == ""
    assert "train 30/30 steps" in (tmp_path / "log.txt").read_text()


def test_an_error_leaves_no_final_line(capsys):
    def fail():
        with Progress("train", total=3) as progress:
            progress.advance()
            progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err.splitlines() == ["train 1/3 steps (33%)"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set: clock.now, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock.now)
    return clock


def test_the_rate_and_the_time_left_do_not_count_the_first_step(capsys, clock):
    with Progress("train", total=100, start=50, every_seconds=0.0) as progress:
        for seconds in (60.0, 2.0, 2.0):  # the first step compiles
            clock.now += seconds
            progress.advance()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train 53/100 steps (53%)  0.5 steps/s  ETA 1:34"


def test_a_line_comes_when_its_time_has_come(capsys, clock):
    with Progress("train", every_seconds=5.0) as progress:
        for _ in range(6):
            progress.advance()
            clock.now += 2.0
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "train 1 steps",
        "train 4 steps",
        "train 6 steps",
    ]


def test_a_narrow_terminal_leaves_out_the_last_fields(clock):
    progress = Progress("train", total=30)
    progress.set_fields({"loss": 3.2, "nats_per_token": None, "tokens_per_second": 9100.4, "grad_norm": 0.5})
    assert progress._text(clock.now) == "0/30 steps (0%)  loss 3.200  9,100 tokens/s  grad 0.5"
    assert progress._text(clock.now, width=45) == "0/30 steps (0%)  loss 3.200  9,100 tokens/s"
    assert progress._text(clock.now, width=3) == "0/30 steps (0%)"


def test_a_part_is_a_bar_of_its_own_until_it_ends(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress("train", total=30) as progress:
        with progress.part("valid", total=2) as part:
            part.advance()
            assert [task.description for task in progress._bar.tasks] == ["train", "valid"]
        assert [task.description for task in progress._bar.tasks] == ["train"]
