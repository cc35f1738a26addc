"""launch/convert.py as a user runs it: out, in, and mistakes in one line."""

import pytest
from helpers import run_script

pytest.importorskip("tokenizers", reason="needs the convert extra")
pytest.importorskip("gguf", reason="needs the convert extra")


@pytest.mark.slow
def test_out_and_in(trained, tmp_path):
    done = run_script("convert", f"--workdir={trained}", "--to=huggingface", f"--out={tmp_path}/model")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/model" in done.stdout
    done = run_script("convert", "--from=huggingface", f"--path={tmp_path}/model", f"--workdir={tmp_path}/back")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/back" in done.stdout
    texts = []
    for workdir in (trained, tmp_path / "back"):
        done = run_script("sample", f"--workdir={workdir}", "--prompt=Once", "--max_tokens=8", "--temperature=0")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    done = run_script("convert", f"--workdir={tmp_path}/back", "--to=ollama", "--dtype=q8_0", f"--out={tmp_path}/o")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "Modelfile").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--workdir={trained}"], "give one of --to=FORMAT"),
        (["--workdir={trained}", "--to=gguf", "--from=huggingface"], "give one of --to=FORMAT"),
        (["--workdir={trained}", "--to=gguf"], "--out is missing"),
        (["--workdir={tmp}/x", "--from=huggingface"], "--path is missing"),
        (
            ["--workdir={trained}", "--to=onnx", "--out={tmp}/x"],
            "--to=onnx must be one of huggingface, peft, gguf, ollama",
        ),
        (["--workdir={trained}", "--to=gguf", "--out={tmp}"], "must not exist yet"),
        (["--workdir={trained}", "--to=huggingface", "--dtype=q8_0", "--out={tmp}/x"], "--dtype=q8_0 must be one of"),
        (["--workdir={tmp}/nothing", "--to=gguf", "--out={tmp}/x"], "must be a folder, and does not exist"),
        (["--workdir={tmp}", "--to=gguf", "--out={tmp}/x"], "must hold an experiment"),
        (["--workdir={trained}", "--to=gguf", "--out={tmp}/x", "--path={tmp}"], "--path has no use with --to"),
        (["--workdir={tmp}/x", "--from=huggingface", "--path={tmp}"], "must be a Hugging Face folder"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, arguments, line):
    done = run_script("convert", *(argument.format(trained=trained, tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert line in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
