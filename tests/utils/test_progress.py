"""Progress is plain lines in a log, a bar on a terminal, and never on standard output."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminals import python, resize, run_in_terminal

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
    assert r"a \x1b[31msample\x07" in lines
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


def test_a_narrow_terminal_keeps_the_loss_longest(clock):
    progress = Progress("train", total=1000)
    progress.set_fields({"loss": 3.2, "nats_per_token": None, "tokens_per_second": 9100.4, "grad_norm": 0.5})
    assert progress._text(clock.now) == "0/1,000 steps (0%)  loss 3.200  9,100 tokens/s  grad 0.5"
    assert progress._text(clock.now, width=50) == "0/1,000 steps (0%)  loss 3.200  9,100 tokens/s"
    assert progress._text(clock.now, width=31) == "0/1,000 steps (0%)  loss 3.200"
    assert progress._text(clock.now, width=26) == "0/1,000 (0%)  loss 3.200"
    assert progress._text(clock.now, width=14) == "0%  loss 3.200"
    assert progress._text(clock.now, width=12) == "loss 3.200"
    assert progress._text(clock.now, width=3) == "0%"


@given(
    width=st.integers(0, 200),
    done=st.integers(0, 10**7),
    total=st.integers(0, 10**7),
    loss=st.floats(-1e6, 1e6),
    title=st.text(max_size=20),
)
def test_a_line_fits_any_width_and_nothing_is_over_100_percent(width, done, total, loss, title):
    progress = Progress(title, total=total, show=False)
    progress._done = done
    progress._fields = {"loss": loss, "tokens_per_second": 1e5, "learning_rate": 1e-3}
    line = progress.live_line(width)
    assert len(line) <= width
    assert all(int(share) <= 100 for share in re.findall(r"(\d+)%", line.removeprefix(progress._title)))
    if width >= len(progress._title) + 2 + 16 + 5:
        assert f"loss {loss:.3f}"[:4] in line


TRAINS = """
from tale_jax.utils.streams import mend_streams
from tale_jax.utils.progress import Progress
import time
mend_streams()
print("results", flush=True)
with Progress("train", total=40) as progress:
    with progress.part("compiling the training step"):
        time.sleep(1.0)
    for step in range(1, 41):
        progress.advance()
        progress.set_fields({"loss": 4 - step / 40, "learning_rate": 1e-3, "tokens_per_second": 9100.4, "grad_norm": 1})
        if step == 20:
            progress.print("step 20: \x1b[2J\x1b]0;title\x07 a sample that is longer than sixty columns, which is well")
            with progress.part("evaluate", total=8) as part:
                for _ in range(8):
                    part.advance()
                    time.sleep(0.15)
        time.sleep(SLEEP)
print("done")
"""


@pytest.mark.parametrize("columns", [100, 60, 40])
def test_a_real_terminal_shows_the_loss_at_any_width(columns):
    ended = run_in_terminal(python(TRAINS.replace("SLEEP", "0.02")), columns)
    screen = ended.screen
    assert ended.returncode == 0 and not screen.unknown, screen.unknown
    assert all(len(frame) < columns for frame in screen.frames)
    trained = [frame for frame in screen.frames if re.search(r" train .*[2-9]/40", frame) and "evaluate" not in frame]
    assert trained and all("loss" in frame for frame in trained)
    silent = [frame for frame in screen.frames if "compiling" in frame]
    assert len(set(silent)) > 1  # the spinner turns while nothing advances
    lines = [line.rstrip() for line in screen.lines]
    assert lines[0] == "results" and lines[-2] == "done" and lines[-1] == ""
    assert lines[-3].startswith("train 40/40 steps (100%)  loss 3.000")  # no spinner stays behind
    assert "\\x1b[2J" in "".join(lines) and len(lines) <= 5 + 100 // columns


def test_a_window_that_shrinks_gets_no_line_per_refresh():
    """A terminal without reflow, as xterm; one with reflow leaves the part that no longer fitted, once."""
    sizes = iter([70, 50, 35])

    def shrink(terminal, output):
        if output.count("\r") % 8 == 0 and (size := next(sizes, 0)):
            resize(terminal, size)

    ended = run_in_terminal(python(TRAINS.replace("SLEEP", "0.05")), 100, during=shrink)
    assert next(sizes, 0) == 0
    assert ended.returncode == 0 and ended.output.count("\n") == 4  # results, the sample, train 40/40, done
    assert "loss" in ended.screen.frames[-1] and len(ended.screen.frames[-1]) < 35


@pytest.mark.parametrize("odd", [{"TERM": "dumb"}, {"TERM": ""}, {"TERM": None, "COLUMNS": "x", "LINES": "-1"}])
def test_odd_terminals_are_no_reason_to_stop(odd):
    ended = run_in_terminal(python(TRAINS.replace("SLEEP", "0.01")), 0, env=odd)  # a size of 0 columns is not believed
    assert ended.returncode == 0 and "train 40/40 steps (100%)" in ended.output
    if odd["TERM"] == "dumb":
        assert "\x1b" not in ended.output


def test_an_ascii_terminal_gets_ascii():
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    ended = run_in_terminal(python(TRAINS.replace("SLEEP", "0.02").replace("a sample", "a “sample” …")), 100, env=env)
    assert ended.returncode == 0 and ended.output.isascii()
    assert '"sample" ...' in ended.output and "==" in ended.output


def test_a_pipe_gets_few_plain_lines():
    done = subprocess.run(python(TRAINS.replace("SLEEP", "0.01")), capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) <= 5
    assert all(c.isprintable() or c == "\n" for c in done.stderr)


def test_silence_is_broken_in_a_pipe_but_rarely(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "FIRST_BEAT", 0.1)
    monkeypatch.setattr(progress_module, "DRAW_SECONDS", 0.01)
    with Progress("train", total=9, every_seconds=0.1) as progress, progress.part("compiling the training step"):
        time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and all(line.startswith("compiling the training step ") for line in lines)


def test_what_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    run(Progress("train", total=30, log=tmp_path / "log.txt"))
    assert "train 30/30 steps" in (tmp_path / "log.txt").read_text()
    (tmp_path / "file").touch()
    for log in (tmp_path / "file" / "log.txt", tmp_path, Path("/dev/full")):
        run(Progress("train", total=30, log=log))


def test_any_name_can_be_logged(tmp_path):
    with Progress("prepare \udcff", log=tmp_path / "log.txt", show=False) as progress:
        progress.print("a name: \udce9 \u2028")
    assert r"a name: \xe9 \u2028" in (tmp_path / "log.txt").read_text()
