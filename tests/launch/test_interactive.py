"""`sample.py --interactive` at a real terminal, and at a pipe."""

import subprocess
import sys

import pytest
from helpers import ROOT, Terminal, run_script

pytestmark = pytest.mark.slow


def test_a_session_as_people_know_it(trained):
    with Terminal("sample", f"--workdir={trained}", "--interactive", "--max_tokens=12", "--seed=5") as terminal:
        assert "/help" in terminal.wait_for_prompt()
        terminal.type("Once\r")
        shown = terminal.wait_for(r"\(seed 5; \d+ tokens in [\d.]+ s.*?\)")
        assert "Once" in shown and "tokens/s" in shown
        terminal.wait_for_prompt()
        terminal.type("\x1b[A\r")  # arrow up: the line before, which has the next seed
        assert terminal.wait_for(r"\(seed 6; ").count("Once") >= 2
        terminal.wait_for_prompt()
        terminal.type("/temperature hot\r")
        terminal.wait_for(r"error: temperature=hot must be a number")
        terminal.wait_for_prompt()
        terminal.type("half a line\x03")  # Ctrl-C at the prompt drops the line
        terminal.wait_for(r"Ctrl-C once more, /quit or Ctrl-D ends\)")
        terminal.wait_for_prompt()
        terminal.type("/seed 5\rOnce\r")
        again = terminal.wait_for(r"\(seed 5; ")
        assert "half a line" not in again
        terminal.wait_for_prompt()
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_the_text_and_a_second_one_ends_the_session(trained):
    with Terminal("sample", f"--workdir={trained}", "--interactive", "--max_tokens=1000000") as terminal:
        for _ in range(2):  # the session goes on after the first
            terminal.wait_for_prompt()
            terminal.type("Once\r")
            terminal.wait_for(r"Once\S*[^\r]*\r\n.*Once")
            terminal.wait_for(r"\S{3}")
            terminal.type("\x03")
            terminal.wait_for(r"\[stopped\]")
            terminal.wait_for(r"\(seed \d; \d+ tokens")
        terminal.wait_for_prompt()
        terminal.type("\x03")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_two_ctrl_c_at_the_prompt_end_the_session(trained):
    with Terminal("sample", f"--workdir={trained}", "--interactive") as terminal:
        terminal.wait_for_prompt()
        terminal.type("\x03")
        terminal.wait_for(r"Ctrl-C once more")
        terminal.wait_for_prompt()
        terminal.type("\x03")
        assert terminal.wait() == 0


def test_only_texts_go_into_a_file(trained, tmp_path):
    flags = [f"--workdir={trained}", "--interactive", "--max_tokens=5"]
    with (tmp_path / "out.txt").open("w") as file, Terminal("sample", *flags, stdout=file) as terminal:
        terminal.wait_for("> ")
        terminal.type("Once\r")
        terminal.wait_for(r"\(seed 0\)")
        terminal.type("/quit\r")
        assert terminal.wait() == 0
    text = (tmp_path / "out.txt").read_text()
    assert text.startswith("Once") and ">" not in text and "seed" not in text


def test_a_pipe_of_prompts_with_a_line_that_is_no_text(trained):
    command = [sys.executable, str(ROOT / "launch" / "sample.py"), f"--workdir={trained}", "--interactive"]
    done = subprocess.run([*command, "--max_tokens=5"], input=b"Once\n\xff\xfe\n/top_p 9\nThe", capture_output=True)
    assert done.returncode == 0, done.stderr
    out, err = done.stdout.decode(), done.stderr.decode()
    assert out.startswith("Once") and "\nThe" in out
    assert err.count("error: ") == 2 and "Traceback" not in err and "(seed 1)" in err


def test_a_closed_stdin_ends_the_session(trained):
    done = run_script("sample", f"--workdir={trained}", "--interactive", "--max_tokens=5", "--prompt=Once")
    assert done.returncode == 0 and done.stdout.startswith("Once")
