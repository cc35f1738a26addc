"""A base fine-tuned: adapters alone are saved, runs resume to the bit, and another base is refused."""

import dataclasses
import json
import shutil

import jax
import pytest
from helpers import assert_trees_equal

from configs import finetune
from tale_jax.config import Config, change
from tale_jax.convert.formats import export_model, import_base, with_base
from tale_jax.data.tales import grammar
from tale_jax.data.token_files import load_tokens
from tale_jax.runs.evaluate import evaluate
from tale_jax.runs.experiment import open_base, open_experiment, weights_digest
from tale_jax.runs.records import read_metrics
from tale_jax.runs.train import train
from tale_jax.runs.verify import verify
from tale_jax.training.checkpoint import SavedParams
from tale_jax.utils.manifests import read_manifest

STEPS = {"total_steps": 6, "batch_size": 4, "evaluate.every_steps": 3, "checkpoint.every_steps": 3}
STEPS |= {"evaluate.max_windows": 4, "sample.num_samples": 1, "sample.max_tokens": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "new.txt"
    path.write_text("\n\n".join(grammar.tell(index, "train", 7).text.upper() for index in range(80)))
    return path


def config_of(variant, base, text, workdir="", **changes):
    values = finetune.get_config(variant)
    values.update_from_flattened_dict(STEPS | {"base": str(base), "corpus.path": str(text)} | changes)
    return with_base(Config.build(values), workdir, set(changes))


def longer(config):
    return change(config, {"total_steps": config.total_steps + 2})


@pytest.mark.parametrize(
    "variant", [pytest.param("full", marks=pytest.mark.slow), "lora", pytest.param("dora", marks=pytest.mark.slow)]
)
def test_a_base_is_fine_tuned_and_resumes_to_the_bit(variant, trained, text, tmp_path, cpu):
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    config = config_of(variant, trained, text)
    train(config, straight, cpu)
    valid = read_metrics(straight)["valid"]
    assert [record["step"] for record in valid] == [0, 3, 6]
    assert valid[-1]["nats_per_token"] < valid[0]["nats_per_token"]
    assert ["base_nats_per_token" in record for record in valid] == [True, False, True]
    old = open_experiment(trained, cpu)

    train(change(config, {"total_steps": 6}), halted, cpu)
    shutil.rmtree(halted / "checkpoints" / "6")  # as if killed after step 3
    train(with_base(config, halted), halted, cpu)
    one, other = (open_experiment(workdir, cpu, step=6) for workdir in (straight, halted))
    assert_trees_equal(one.params, other.params)
    assert any((a != b).any() for a, b in zip(*(jax.tree_util.tree_leaves(e.params) for e in (one, old))))

    saved = sum(f.stat().st_size for f in (straight / "checkpoints" / "6" / "params").rglob("*") if f.is_file())
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(old.params))
    assert (one.adapted is None) == (variant == "full")
    if variant != "full":
        assert saved < size / 2
        assert evaluate(one, num_samples=0)["params"] == evaluate(old, num_samples=0)["params"]


@pytest.mark.slow
def test_another_base_is_refused_and_a_moved_one_found(trained, text, tmp_path, cpu, monkeypatch):
    base, workdir = tmp_path / "bases" / "one", tmp_path / "run"
    shutil.copytree(trained, base)
    monkeypatch.chdir(base.parent)
    train(config_of("lora", "one", text, total_steps=2), workdir, cpu)
    before = open_experiment(workdir, cpu).params
    monkeypatch.chdir(tmp_path)
    assert_trees_equal(open_experiment(workdir, cpu).params, before)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"base=.* must hold a model .* copy or link it to .*/run/base"):
        open_experiment(workdir, cpu)
    (workdir / "base").symlink_to(tmp_path / "moved")
    assert_trees_equal(open_experiment(workdir, cpu).params, before)
    _, written = open_experiment(workdir, cpu), json.loads((workdir / "base.json").read_text())
    (workdir / "base.json").write_text(json.dumps(written | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match=r"base=.* must be the model of digest 000000000000 .* has [0-9a-f]{12}; "):
        open_experiment(workdir, cpu)


@pytest.mark.slow
def test_a_checkpoint_knows_its_base_without_the_file_that_names_it(trained, text, tmp_path, cpu):
    base, workdir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained, base)
    config = config_of("lora", base, text, total_steps=2)
    train(config, workdir, cpu)
    before, file = open_experiment(workdir, cpu), workdir / "base.json"
    written = json.loads(file.read_bytes())
    digest = weights_digest(open_experiment(trained, cpu).params)
    assert read_manifest(workdir / "checkpoints" / "2")["base"] == written["digest"] == digest

    for content in ("{", "[]", "{}", json.dumps(written | {"step": "2"}), "[" * 60_000, json.dumps({"path": "x"})):
        file.write_text(content)
        for read in (lambda: open_experiment(workdir, cpu), lambda: train(longer(config), workdir, cpu)):
            with pytest.raises(ValueError, match=r"^\S*base\.json must .*; restore it from a copy, or remove it: .*$"):
                read()
        assert any(line.startswith("base.json") for line in verify(workdir).bad)
    file.unlink()  # as it is told
    assert_trees_equal(open_experiment(workdir, cpu).params, before.params)
    assert json.loads(file.read_bytes()) == written and not verify(workdir).bad

    # Another model in its place: another checkpoint of the same run, here.
    step = next(step for step in SavedParams(base).steps if step != written["step"])
    for change_file in (lambda: file.unlink(), lambda: file.write_text(json.dumps(written | {"step": step}))):
        shutil.rmtree(base / "checkpoints" / str(written["step"]), ignore_errors=True)
        change_file()
        other = weights_digest(open_experiment(base, cpu).params)[:12]
        for read in (lambda: open_experiment(workdir, cpu), lambda: train(longer(config), workdir, cpu)):
            with pytest.raises(ValueError, match=f"must be the model of digest {digest[:12]} .* has {other}; if you"):
                read()


@pytest.mark.slow
def test_a_hugging_face_folder_is_a_base(trained, text, tmp_path, cpu):
    export_model(open_experiment(trained, cpu), "huggingface", tmp_path / "theirs")
    workdir = tmp_path / "run"
    config = config_of("lora", tmp_path / "theirs", text, **{"model.seq_len": 64, "total_steps": 2})
    assert config.model.seq_len == 64 and not config.model.scale_embeddings
    import_base(config, workdir)
    train(config, workdir, cpu)
    shutil.rmtree(tmp_path / "theirs")  # the workdir has it
    assert open_experiment(workdir, cpu).step == 2


def test_a_base_that_is_gone(trained, text, tmp_path, cpu):
    config = config_of("lora", trained, text)
    with pytest.raises(ValueError, match=r"must hold a model .*; give a workdir or a Hugging Face folder"):
        open_base(tmp_path / "new", dataclasses.replace(config, base=str(tmp_path / "gone")), cpu)
    (tmp_path / "new").mkdir()
    assert open_base(tmp_path / "new", config, cpu).step


@pytest.mark.slow
def test_a_base_learns_to_answer(trained, tmp_path, cpu):
    """Conversations, from a corpus to a chat: prepared, learned, resumed to the bit, scored and asked."""
    changes = {"corpus.name": "tales_chat", "model.seq_len": 512, "corpus.num_train_tales": 60, "lora.rank": 4}
    changes |= {"corpus.num_valid_tales": 12, "corpus.num_test_tales": 6, "evaluate.max_windows": 0}
    config = config_of("lora", trained, "", **changes)
    train(config, tmp_path / "run", cpu)
    valid = read_metrics(tmp_path / "run")["valid"]
    assert valid[-1]["nats_per_token"] < valid[0]["nats_per_token"] and "base_nats_per_token" in valid[0]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    train(with_base(config, tmp_path / "again"), tmp_path / "again", cpu)
    one, other = (open_experiment(tmp_path / name, cpu, step=6) for name in ("run", "again"))
    assert_trees_equal(one.params, other.params)
    result = evaluate(one, num_samples=5)
    assert result["num_questions"] == 5 and 0 <= result["right_share"] <= 1
    assert result["nats_per_token"] == pytest.approx(valid[-1]["nats_per_token"], rel=1e-5)
    counted = load_tokens(tmp_path / "run", "valid")[1].chat["learned_tokens"]
    assert result["tokens"] == counted
    with pytest.raises(ValueError, match=r"--quality must measure text, and .* leave --quality out"):
        evaluate(one, num_samples=0, with_quality=True)


@pytest.mark.slow
def test_what_cannot_be_a_base(trained, text, tmp_path, cpu):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"base=.*empty must be a workdir or a Hugging Face folder"):
        config_of("lora", tmp_path / "empty", text)
    with pytest.raises(ValueError, match=r"model.num_layers=9 must be 2, as base=.* leave out --config.model.num_l"):
        config_of("lora", trained, text, **{"model.num_layers": 9})
    with pytest.raises(ValueError, match=r"base= must name the model"):
        train(dataclasses.replace(config_of("lora", trained, text), base=""), tmp_path / "x", cpu)
    with pytest.raises(
        ValueError,
        match=r"optimizer.name=\"muon\" must be adamw .*; set --config.optimizer.name=adamw",
    ):
        train(config_of("lora", trained, text, **{"optimizer.name": "muon"}), tmp_path / "x", cpu)
    with pytest.raises(ValueError, match=r"minutes=2.0 must be 0 with a base, .*; set --config.minutes=0"):
        train(config_of("lora", trained, text, minutes=2.0), tmp_path / "x", cpu)
    with pytest.raises(ValueError, match=r"lora.rank=999 must not exceed \d+, .*; try --config.lora.rank=\d+"):
        train(config_of("lora", trained, text, **{"lora.rank": 999}), tmp_path / "z", cpu)
    shutil.copytree(trained, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    with pytest.raises(ValueError, match=r"finetune.py:loar is not a variant; there are :full, :lora and :dora"):
        finetune.get_config("loar")
    with pytest.raises(ValueError, match=r"base=.*bare must hold a tokenizer"):
        train(config_of("lora", tmp_path / "bare", text), tmp_path / "y", cpu)
    own = config_of("lora", trained, text)
    with pytest.raises(ValueError, match=r"base=.* must not be the workdir itself; give another --workdir"):
        open_base(trained, own, cpu)
    (tmp_path / "y").mkdir()  # what was refused left nothing
    assert open_base(tmp_path / "y", own, cpu).step  # each corrected as it is told
    assert finetune.get_config("full").lora.rank == 0
