"""Standard streams in every state that a shell or a terminal leaves them in, and text that would steer a terminal."""

import os
import subprocess
import sys
import unicodedata

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from terminals import python, run_in_terminal

from tale_jax.utils.streams import printable

SCRIPT = """
import os, sys, warnings, logging
from tale_jax.utils.streams import mend_streams, notice, say
from tale_jax.utils.progress import Progress
mend_streams()
held = open(os.devnull)
assert held.fileno() > 2, "a file got the number of a closed stream"
with Progress("train", total=300, every_seconds=0.0) as progress:
    for _ in range(300):
        progress.advance()
    progress.print("a “sample”\\x1b[2J \\udcff → naïve")
notice("runs on\\x07 the CPU")
warnings.warn("beware")
logging.getLogger("other").warning("beware")
say("the result is naïve “text” \\udcff")
sys.stdin.read()
sys.stdout.flush()
open(sys.argv[1], "w").write("reached the end")
"""


def shell(tmp_path, redirections: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs the script by a shell with `redirections` behind it."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    command = f'"{sys.executable}" "{script}" "{tmp_path}/end" {redirections}'
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | (env or {}), timeout=60)


@pytest.mark.parametrize(
    "redirections",
    [
        "<&-",
        "2>&-",
        ">&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "2>/dev/full",
        "< /dev/null",
        "2> >(true)",  # a reader that goes away at once
        "2>&1 | (sleep 0.2; head -c 1 > /dev/null)",
    ],
)
def test_whatever_the_shell_does_to_the_streams_the_script_ends(tmp_path, redirections):
    done = shell(tmp_path, redirections)
    if "|" not in redirections:  # there stdout breaks, which is an error: see test_cli.py
        assert (tmp_path / "end").read_text() == "reached the end", done.stderr
    assert b"Traceback" not in done.stderr or b"BrokenPipe" in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
)
def test_characters_that_an_encoding_lacks_are_written_in_ascii(tmp_path, env):
    done = shell(tmp_path, "< /dev/null", env)
    assert done.returncode == 0, done.stderr
    assert b"the result is na" in done.stdout and b"\\xff" in done.stdout
    assert b"\\x1b[2J" in done.stderr and b"\x1b" not in done.stderr
    if env.get("PYTHONIOENCODING") == "ascii":
        assert done.stdout.isascii() and b'"text"' in done.stdout


def test_a_stream_that_does_not_block_gets_everything(tmp_path):
    """Another program on the same terminal may have set it so."""
    code = (
        "import fcntl, os\nfrom tale_jax.utils.streams import mend_streams\n"
        "for number in (1, 2): os.set_blocking(number, False)\n"
        "mend_streams()\n"
        "for number in range(20000): print(f'{number:06} xxxxxxxxxxxxxxxxxxxxxxxx')\n"
    )
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        lines = process.stdout.read().splitlines()
        assert process.stderr.read() == b""
    assert [int(line.split()[0]) for line in lines] == list(range(20000))


def test_results_are_written_out_on_a_terminal_and_kept_in_a_file(tmp_path):
    code = (
        "from tale_jax.utils.streams import mend_streams, say\nmend_streams()\nsay('a\\x1b[31mname\\x07\\u202e\\tb')\n"
    )
    assert subprocess.run(python(code), capture_output=True).stdout == "a\x1b[31mname\x07\u202e\tb\n".encode()
    ended = run_in_terminal(python(code))
    assert ended.output == "a\\x1b[31mname\\x07\\u202e\tb\r\n" and not ended.screen.unknown


@given(st.text(alphabet=st.characters(codec=None)))
def test_nothing_that_is_printable_steers_a_terminal(text):
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    assert not set(shown) & set("\u202a\u202e\u2066\u2069\u2028")


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp"])))
def test_text_of_any_language_stays(text):
    assert printable(text) == text
    assert printable("👩‍👩‍👧 نمی‌خواهم \xa0 soft\xadhyphen") == "👩‍👩‍👧 نمی‌خواهم \xa0 soft\xadhyphen"


def test_a_table_is_cut_neither_in_a_pipe_nor_on_a_terminal(tmp_path):
    """In a pipe a row is one line, however long; on a terminal it folds."""
    words = [f"word{i:03}" for i in range(40)]
    code = (
        "from tale_jax.utils.streams import table_console; import rich.table; "
        "table = rich.table.Table(box=None, show_header=False); "
        f"table.add_row(*{[' '.join(words[i::2]) for i in range(2)]!r}); table_console().print(table)"
    )
    piped = subprocess.run(python(code), capture_output=True, text=True, check=True)
    assert len(piped.stdout.splitlines()) == 1 and set(piped.stdout.split()) == set(words)
    shown = run_in_terminal(python(code), columns=60)
    assert set(" ".join(shown.screen.lines).split()) == set(words)
    assert max(map(len, shown.screen.lines)) <= 60
