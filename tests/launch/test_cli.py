"""Every mistake on a command line ends in one clear line on stderr and exit code 2."""

import subprocess
import sys

import pytest
from helpers import FLAG_DEFINITIONS, ROOT

SCRIPT = '''"""A script that costs 100% nothing."""

import sys

sys.path.insert(0, "LAUNCH")
from cli import run
FLAG_DEFINITIONS
FAULT = flags.DEFINE_string("fault", "", "what goes wrong")


def main(argv):
    match FAULT.value:
        case "mistake":
            raise ValueError("model.embed_dim=100 must be\\n divisible by 12; try 96")
        case "disk":
            open("/no/such/folder")
        case "bug":
            raise KeyError("bug")
        case "interrupt":
            raise KeyboardInterrupt
        case "flood":
            print("x\\n" * 200_000)
    print("seed", CONFIG.value.seed if CONFIG.value else None)


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cli")
    script = folder / "tiny.py"
    script.write_text(SCRIPT.replace("FLAG_DEFINITIONS", FLAG_DEFINITIONS).replace("LAUNCH", str(ROOT / "launch")))
    (folder / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (folder / "refuses.py").write_text("def get_config(size):\n    raise ValueError(f'no\\nsize {size}')\n")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("")

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        args = tuple(arg.replace("HERE", str(folder)) for arg in args)
        return subprocess.run([sys.executable, str(script), *args], cwd=ROOT, capture_output=True, text=True)

    return call


BASE = ("--workdir=w", "--config=configs/base.py")

MISTAKES = {
    ("--config=configs/base.py",): ["--workdir is missing", "--workdir="],
    (*BASE, "--wrkdir=x"): ["--wrkdir", "did you mean --workdir?"],
    (*BASE, "--top_p=1.5"): ["--top_p=1.5", "[0.0, 1.0]", "1.0"],
    (*BASE, "--count=1.5"): ["--count=1.5", "an integer", "3"],
    (*BASE, "--json=maybe"): ["--json=maybe", "true or false"],
    (*BASE, "--split=vald"): ["--split=vald", "train, valid, test", "did you mean valid?"],
    (*BASE, "--count"): ["--count", "--name=value"],
    (*BASE, "stray"): ["'stray'", "--name=value"],
    (*BASE, "--config.seed=abc"): ["--config.seed=abc", "an integer", "0"],
    (*BASE, "--config.sed=1"): ["--config.sed", "did you mean --config.seed?"],
    (*BASE, "--config.model.embed_dm=1"): ["--config.model.embed_dm", "did you mean --config.model.embed_dim?"],
    (*BASE, "--config.modl.embed_dim=1"): ["--config.modl.embed_dim", "did you mean --config.model.embed_dim?"],
    (*BASE, "--config.embed_dim=1"): ["--config.embed_dim", "did you mean --config.model.embed_dim?"],
    (*BASE, "--config.model.zzzz=1"): ["--config.model.zzzz", "model has", "num_layers"],
    (*BASE, "--config.model.word_dropout=0.1"): ["model.word_dropout", "it is now --config.model.embedding_dropout"],
    (*BASE, "--config.average.decay=0.9"): ["--config.average.decay", "it is now --config.ema.decay"],
    (*BASE, "--config.optimizer.cautious=True"): ["--config.optimizer.cautious", "it was removed; leave it out"],
    (*BASE, "--config.zzzz=1"): ["--config.zzzz: there is no such setting", "tale_jax/config.py"],
    (*BASE, "--config.seed.zz=1"): ["--config.seed.zz", "there is no such setting"],
    (*BASE, "--config.model=1"): ["--config.model=1", "group"],
    (*BASE, "--config.metrics.tensorboard=maybe"): ["--config.metrics.tensorboard=maybe", "true or false"],
    ("--workdir=w", "--config.seed=1"): ["--config.seed", "--config=configs/NAME.py"],
    ("--workdir=w", "--config.seed=1", "--config=configs/base.py"): ["--config=FILE", "before"],
    ("--workdir=w", "--config=configs/bse.py"): ["configs/bse.py", "no such file", "did you mean configs/base.py?"],
    ("--workdir=w", "--config=configs/bse.py", "--config.seed=1"): ["configs/bse.py", "no such file"],
    ("--workdir=w", "--config", "nowhere/x.py"): ["nowhere/x.py", "no such file", "configs/base.py"],
    ("--workdir=w", "--config=HERE/raises.py"): ["raises.py", "line 2", "division by zero"],
    ("--workdir=w", "--config=HERE/refuses.py:big"): ["refuses.py:big", "no size big"],
    ("--workdir=w", "--config=configs/tales.py:big"): ["error: --config=configs/tales.py:big is not a variant"],
    ("--workdir=w", "--config=HERE/broken.py"): ["broken.py", "SyntaxError"],
    ("--workdir=w", "--config=HERE/empty.py"): ["empty.py", "get_config"],
    (*BASE, "--fault=mistake"): ["model.embed_dim=100 must be divisible by 12; try 96"],
    (*BASE, "--fault=disk"): ["/no/such/folder: No such file or directory"],
}


@pytest.mark.parametrize("args", MISTAKES, ids=lambda args: args[-1].rpartition("/")[2])
def test_a_mistake_gets_one_line_and_exit_code_2(call, args):
    done = call(*args)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    for words in MISTAKES[args]:
        assert words in done.stderr


def test_good_flags_reach_main(call):
    done = call(*BASE, "--config.metrics.tensorboard", "--config.seed=7", "--nojson")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seed 7\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_docstring_and_own_flags_whatever_else_is_given(call, flag):
    done = call("--nonsense", flag)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "A script that costs 100% nothing." in done.stdout
    assert "--workdir" in done.stdout
    assert "pdb" not in done.stdout


def test_a_bug_shows_its_traceback(call):
    done = call(*BASE, "--fault=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError" in done.stderr


def test_verbosity_shows_where_a_mistake_was_found(call):
    done = call(*BASE, "--fault=mistake", "--verbosity=1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_interrupt_is_130(call):
    done = call(*BASE, "--fault=interrupt")
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(call, tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(SCRIPT.replace("FLAG_DEFINITIONS", FLAG_DEFINITIONS).replace("LAUNCH", str(ROOT / "launch")))
    with subprocess.Popen(
        [sys.executable, str(script), "--workdir=w", "--fault=flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
