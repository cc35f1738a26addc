"""Every block of output in the README files is produced by a command that runs here, or says when and where it was."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from readme_blocks import Block, find_blocks, main, mismatch, read_options, refreshed, run_command, with_small_flags

BLOCKS = list(find_blocks())
RUN = [block for block in BLOCKS if block.options and "run" in block.options]
# A day, a machine, and what it ran with.
FROM = re.compile(r"20\d\d-\d\d-\d\d, .*(cores|GPU|H100|Mac).*, jax \d+\.\d+.*")


def test_every_block_of_output_says_where_it_comes_from():
    wrong = []
    for block in BLOCKS:
        options = block.options
        if options is None:
            wrong.append(f"{block.place}: no <!-- output: … --> above it")
        elif ("run" not in options or "numbers" not in options) and not FROM.fullmatch(options.get("from", "")):
            wrong.append(f"{block.place}: from='{options.get('from', '')}' must name day, machine and jax")
        elif "run" not in options and options.keys() & {"free", "numbers", "small"}:
            wrong.append(f"{block.place}: what is not run has nothing to compare")
    assert not wrong, "\n".join(wrong)
    assert len(RUN) >= 7 and len(BLOCKS) > len(RUN)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """Where a user would be: recipes, and the experiments that the blocks are about, each after the tiny recipe."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("tales", "a", "b"):
        shutil.copytree(trained, folder / "experiments" / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.place)
def test_a_block_shows_what_its_commands_print(block: Block, folder):
    options = block.options or {}
    for command, shown in block.steps:
        refreshed(shown, run_command(command, folder, options.get("small", "")), options)


def test_a_short_block_shows_what_its_command_prints(folder):
    """The block of a mistake, which takes a second: so the quick suite notices when the mechanism breaks."""
    [block] = [block for block in RUN if len(block.lines) == 2 and block.lines[1].startswith("error: ")]
    for command, shown in block.steps:
        refreshed(shown, run_command(command, folder), block.options or {})


def test_the_demo_in_the_readme_is_the_one_of_the_blocks():
    """The table of README.md has the numbers of the evaluate.py block."""
    [block] = [block for block in RUN if "launch/evaluate.py --workdir=experiments/tales" in block.lines[0]]
    shown = dict(re.findall(r"(?m)^ *(\w+)  ([-\d.]+)", "\n".join(block.lines)))
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**{shown['excess_nats_per_token']}** nats/token above the entropy" in table
    assert f"**{100 * float(shown['accepted_share']):.0f} of 100** tales" in table
    assert f"{100 * float(shown['copied_share']):.0f} of 100 are copied" in table


SHOWN = ["step 10: loss 3.25", "…", "   train  1,200  5%", "… cores; GFLOP/s: 20", "done"]
PRINTED = ["starts", "step 20: loss 3.5", "x", "train    900   7%", "a CPU, 2 cores; GFLOP/s: 21", "y", "done"]


def test_lines_are_matched_with_other_numbers_and_taken_over():
    assert refreshed(SHOWN, PRINTED, {"run": ""}) == [PRINTED[1], "…", PRINTED[3], SHOWN[3], "done"]


@pytest.mark.parametrize("change", [{0: "step 10: perplexity 3.25"}, {4: "done!"}, {0: "done", 4: "step 10: loss 1"}])
def test_a_line_that_is_not_printed_any_more_is_noticed(change):
    shown = [change.get(i, line) for i, line in enumerate(SHOWN)]
    with pytest.raises(ValueError, match="is not printed any more"):
        refreshed(shown, PRINTED, {"run": ""})


def test_numbers_are_held_within_their_bounds():
    assert not mismatch("peak 1.00 GB of 2", "peak 1.05 GB of 2", {"numbers": "10%"})
    assert mismatch("peak 1.00 GB of 2", "peak 1.25 GB of 2", {"numbers": "10%"}) == "1 is 1.25 now"
    assert mismatch("−3.0 %", "+3.0 %", {"numbers": "10%"})
    assert not mismatch("  cpu     Intel, 2 cores", "  cpu   AMD, 8 cores", {"free": "^ "})
    assert mismatch("  cpu     Intel, 2 cores", "  gpu   AMD, 8 cores", {"free": "^ "})


def test_small_flags_take_the_place_of_those_shown():
    words = ["--config=configs/m2_air.py", "--config.seed=1", "--seconds=10"]
    small = with_small_flags(words, "--config=configs/tales.py:tiny --seconds=0")
    assert small == ["--config=configs/tales.py:tiny", "--seconds=0", "--config.seed=1"]
    with pytest.raises(ValueError, match="no such words: fre"):
        read_options("<!-- output: run fre=x -->")
    assert read_options("<!-- run: example -->") is None


def test_blocks_are_written_anew(tmp_path, monkeypatch):
    """What stands between is left alone; a block whose lines do not come any more is left alone, too."""
    text = "# Title\n\n<!-- output: run from='old' -->\n```\n$ python launch/x.py\nloss 1\n```\nbetween\n\n"
    text += "<!-- output: run from='old' -->\n```\n$ python launch/x.py\nlos 1\n```\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr("readme_blocks.ROOT", tmp_path)
    monkeypatch.setattr("readme_blocks.find_blocks", lambda: list(find_blocks(tmp_path, ["README.md"])))
    monkeypatch.setattr("readme_blocks.run_command", lambda *_: ["loss 2"])
    main()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[5] == "loss 2" and FROM.fullmatch(lines[2].split("'")[1]) and lines[12] == "los 1"
    assert len(lines) == len(text.splitlines())
