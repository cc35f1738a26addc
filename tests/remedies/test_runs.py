"""What is said of a run, its workdir or its samples is done, and the run goes on."""

import dataclasses
import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, build_config, tiny_trainer
from remedies.test_data import SENTENCES, refusal

from configs import base
from tale_jax.bench import compare as compare_module
from tale_jax.bench.compare import compare, run_json_lines, sweep_variants
from tale_jax.bench.profile import profile
from tale_jax.bench.run import BenchRequest, bench
from tale_jax.bench.throughput import Bench
from tale_jax.config import Config, change, settings
from tale_jax.data.prepare import prepare
from tale_jax.data.tales import grammar
from tale_jax.evaluation.ngram import NgramModel
from tale_jax.hardware.backend import for_mac
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.planning import autotune
from tale_jax.planning import plan as plan_module
from tale_jax.planning.plan import check_fits, make_plan, print_plan, remedies
from tale_jax.runs.evaluate import evaluate
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.report import write_report
from tale_jax.runs.train import RunHooks, train
from tale_jax.training.checkpoint import Checkpoints
from tale_jax.training.metrics import open_sinks
from tale_jax.utils.format import parse_bytes
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.manifests import MANIFEST, digest_of, read_manifest, write_manifest

SETTINGS = settings()
SMALL = {
    "corpus.num_train_tales": 60,
    "corpus.num_valid_tales": 8,
    "corpus.num_test_tales": 8,
    "model.num_layers": 1,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.seq_len": 64,
    "sample.max_tokens": 8,
    "evaluate.max_windows": 8,
    "precision": "float32",
}


def flags_in(line: str) -> dict[str, Any]:
    """The settings that a message names as flags, by dotted name and in their own types."""
    found = {}
    for word in shlex.split(line.replace("'", "") if line.count("'") % 2 else line):
        if named := re.fullmatch(r"--config\.([\w.]+)=([^;,)]*)[;,)]?", word):
            kind = type(SETTINGS[named[1]].default)
            found[named[1]] = named[2] == "True" if kind is bool else kind(named[2])
    assert found, line
    return found


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a trained workdir."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def signed(values: dict[str, Any]) -> str:
    """The JSON of a config, or of the manifest of a split, with the digest that fits it."""
    values = {name: value for name, value in values.items() if name != "digest"}
    return json.dumps(values | {"digest": digest_of(values)})


# A workdir, and what is opened from it.


def test_a_workdir_that_is_no_experiment(run, tmp_path, cpu):
    line = refusal(open_experiment, tmp_path / "empty", cpu)
    assert line.endswith("give the folder that launch/train.py wrote")
    assert open_experiment(run, cpu).step
    (tmp_path / "untrained").mkdir()
    shutil.copy(run / "config.json", tmp_path / "untrained")
    assert refusal(open_experiment, tmp_path / "untrained", cpu).endswith("train first with launch/train.py")
    shutil.copytree(run / "checkpoints", tmp_path / "untrained" / "checkpoints")  # which training leaves
    shutil.copytree(run / "tokenizer", tmp_path / "untrained" / "tokenizer")
    assert open_experiment(tmp_path / "untrained", cpu).step == 20


def test_a_config_that_is_restored_or_left_behind(run, tmp_path):
    path = run / "config.json"
    whole = path.read_text()
    values = json.loads(whole)
    without_seed = {name: value for name, value in values.items() if name != "seed"}
    for broken, said in (
        ("{", "--repair`), or train in a new workdir"),
        ("[]", "--repair`), or train in a new workdir"),
        (signed({n: v for n, v in values.items() if n != "format"}), "train again in a new workdir, or use the"),
        (signed(values | {"format": 10**6}), "update tale_jax if a newer one wrote the file, otherwise restore it"),
        (signed(without_seed), "add it (configs/base.py has every setting)"),
        (signed(values | {"model": 3}), "set one of those in it"),
    ):
        path.write_text(broken)
        assert said in refusal(Config.load, run)
        path.write_text(whole)
        assert Config.load(run)
    path.write_text(signed(without_seed | {"seed": base.get_config().seed}))
    assert Config.load(run).seed == 0
    (tmp_path / "new").mkdir()
    Config.load(run).save(tmp_path / "new")
    assert Config.load(tmp_path / "new")


def test_weights_are_asked_for_as_it_is_told(run, cpu):
    steps = re.search(r"there is (\d+), (\d+)$", refusal(open_experiment, run, cpu, step=7))
    assert steps and [open_experiment(run, cpu, step=int(step)).step for step in steps.groups()] == [10, 20]
    told = re.search(r"there is (\w+), and (mean:)K$", refusal(open_experiment, run, cpu, weights="ema"))
    assert told and open_experiment(run, cpu, weights=told[1]).weights == "last"
    most = re.search(
        r"mean:K of the (\d+) checkpoints up to step 20", refusal(open_experiment, run, cpu, weights="mean:9")
    )
    assert most and open_experiment(run, cpu, weights=f"mean:{most[1]}").weights == "mean:2"
    told = re.search(r"try --weights=(\S+)$", refusal(open_experiment, run, cpu, weights="best"))
    assert told and open_experiment(run, cpu, weights=told[1]).weights == told[1]


def test_a_report_is_written_when_there_is_what_it_asks_for(run, tmp_path):
    named = re.search(r"as --workdir=experiments/(NAME)$", refusal(write_report, []))
    assert named and write_report([run]).is_file()
    assert refusal(write_report, [tmp_path / "no"]).endswith("give the folder of an experiment")
    (tmp_path / "fresh").mkdir()
    assert refusal(write_report, [tmp_path / "fresh"]).endswith("train first, then report")
    shutil.copy(run / "metrics.jsonl", tmp_path / "fresh")
    assert write_report([tmp_path / "fresh"]).is_file()
    (run / "config.json").write_text("{")
    line = refusal(write_report, [run])
    assert line.endswith("restore it from a copy, or remove it")
    Path(line.partition(" is not JSON")[0]).unlink()
    assert write_report([run]).is_file()


# Training.


def test_a_run_goes_on_with_the_setting_that_is_named(run, tmp_path, cpu):
    """Of every type; a path with spaces and quotes is a word of a shell's command line."""
    for name, value in (("model.num_heads", 4), ("windows", "stream"), ("model.qk_norm", False), ("seed", 3)):
        line = refusal(train, build_config(**{name: value}), run, cpu)
        assert line.endswith("to resume it, or give another --workdir")
        advised = flags_in(line.partition("; ")[2])
        assert set(advised) == {name} and train(build_config(**{name: value} | advised), run, cpu).step == 20
    saved = Config.load(run)
    odd = "it's a path/with spaces"
    moved = dataclasses.replace(saved, corpus=dataclasses.replace(saved.corpus, path=odd))
    moved.save(run)
    for folder in (run / "checkpoints").glob("[0-9]*"):  # which tell of the settings, too
        facts = {name: value for name, value in read_manifest(folder).items() if name != "files"}
        write_manifest(folder, facts | {"settings": moved.to_json()})
    line = refusal(train, build_config(), run, cpu)
    flag = re.search(r"set (--config.*) to resume it", line)
    assert flag and shlex.split(flag[1]) == [f"--config.corpus.path={odd}"]
    assert train(build_config(**{"corpus.path": odd}), run, cpu).step == 20


def test_a_prompt_that_no_sample_could_follow_is_shortened(run, tmp_path, cpu, monkeypatch):
    """Before anything is compiled; the limit that is named is the limit."""
    monkeypatch.setattr("tale_jax.runs.train.make_trainer", None)
    word = " a"
    line = refusal(train, build_config(**{"sample.prompt": word * 4000}), run, cpu)
    limit = re.search(
        r'^sample\.prompt=".*\.\.\. must be at most (\d+) tokens, but is \d+ .*; shorten it, or leave it out', line
    )
    assert limit
    monkeypatch.undo()
    tokens = open_experiment(run, cpu).tokenizer.encode
    fitting = max(range(400), key=lambda n: len(tokens(word * n)) if len(tokens(word * n)) <= int(limit[1]) else 0)
    assert train(build_config(**{"sample.prompt": word * fitting}), run, cpu).step == 20
    assert refusal(train, build_config(**{"sample.prompt": word * (fitting + 1)}), run, cpu)
    assert train(build_config(**{"sample.prompt": ""}), run, cpu).step == 20


def test_what_can_be_checked_is_checked_before_the_text_is_prepared():
    for changes in (
        {"sample.prompt": " \n\t"},
        {"sample.prompt": "half \ud83d"},
        {"schedule.warmup_steps": 21},
        {"corpus.encoding": "zzzz"},
        {"sample.temperature": float("nan")},
        {"checkpoint.keep": 0},
    ):
        with pytest.raises(ValueError, match=" must "):
            build_config(**changes)


@pytest.mark.slow
def test_a_run_that_diverged_learns_at_the_rate_that_is_advised(tmp_path, cpu):
    wild = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}
    wild |= {"evaluate.every_steps": 100, "total_steps": 14}  # ten updates in a row are left out before it ends
    for number in range(80):
        try:
            assert train(build_config(**SMALL | wild), tmp_path / "run", cpu).step == 14 and number
            break
        except ValueError as error:
            told = re.search(r"a smaller rate, as --config\.optimizer\.learning_rate=([^;]+);", str(error))
            assert told or number  # later ones may end between what was told and what would have worked
            wild["optimizer.learning_rate"] = (float(told[1]) if told else wild["optimizer.learning_rate"]) / 1e6
    else:
        raise AssertionError(wild)


@pytest.mark.slow
def test_memory_that_ran_out_and_the_same_command_with_less(tmp_path, cpu, monkeypatch):
    small = SMALL | {"checkpoint.every_steps": 2, "total_steps": 4}

    def fail(self, step, metrics):
        if step == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "on_metrics", fail)
        with pytest.raises(MemoryError, match=r"the same command goes on from there with less") as caught:
            train(build_config(**small), tmp_path, cpu)
    less = [flags_in(part) for part in re.findall(r"--config\S+(?: --config\S+)*", str(caught.value))]
    assert len(less) == 2
    assert train(build_config(**small, **less[0]), tmp_path, cpu).step == 4


@pytest.mark.slow
def test_a_data_position_of_other_text(tmp_path, cpu, capsys):
    """The windows were removed, other text was prepared in their place, and the checkpoint says nothing of windows."""
    texts, workdir = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    (texts / "book.txt").write_text("\n\n".join(SENTENCES))
    files = {"corpus.name": "files", "corpus.path": str(texts), "tokenizer.vocab_size": 320, "corpus.held_out": 0.15}
    small = SMALL | files | {"windows": "stream", "model.mask_documents": False, "total_steps": 2}
    assert train(build_config(**small), workdir, cpu).step == 2
    kept = (workdir / "tokenizer" / "tokenizer.model").read_bytes()
    shutil.rmtree(workdir / "windows")
    (texts / "more.txt").write_text("\n\n".join(reversed(SENTENCES)))
    prepare(build_config(**small), workdir)
    (workdir / "tokenizer" / "tokenizer.model").write_bytes(kept)
    for manifest in (workdir / "windows").glob("*.json"):
        values = json.loads(manifest.read_text()) | {"tokenizer": open_experiment(workdir, cpu).tokenizer.fingerprint}
        manifest.write_text(signed(values))
    facts = read_manifest(checkpoint := workdir / "checkpoints" / "2")
    write_manifest(checkpoint, {name: fact for name, fact in facts.items() if name not in ("files", "windows")})
    longer = small | {"total_steps": 4}
    line = refusal(train, build_config(**longer), workdir, cpu)
    assert "as when the data position was saved" in line
    assert train(build_config(**longer, **flags_in(line)), workdir, cpu).step == 4
    assert "the text has changed: training goes on with the weights" in capsys.readouterr().err


def test_the_folder_that_an_example_names_is_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"try --config\.corpus\.path=(\S+)") as caught:
        build_config(**{"corpus.name": "files"})
    name = re.search(r"try --config\.corpus\.path=(\S+)", str(caught.value))[1]
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    (Path(name) / "book.txt").write_text("\n\n".join(SENTENCES))
    files = {"corpus.name": "files", "corpus.path": name, "tokenizer.vocab_size": 320, "model.seq_len": 32}
    assert prepare(build_config(**files), tmp_path / "work").manifests["train"].tokens


def test_a_writer_is_stopped_as_told(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tale_jax.utils.locks import writer_lock\n"
        "with writer_lock(Path(sys.argv[1]), 'train'):\n    print('held', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout and process.stdout.readline()
        with pytest.raises(ValueError, match="is in use by train") as caught, writer_lock(tmp_path, "prepare"):
            pass
        with writer_lock(tmp_path / "another", "prepare"):
            pass
        stop = re.search(r"stop it with `(kill \d+)`", str(caught.value))
        assert stop and subprocess.run(stop[1].split()).returncode == 0
        process.wait(60)
    with writer_lock(tmp_path, "prepare"):
        pass
    # A holder of which nothing is known, or on another machine.
    from tale_jax.utils.locks import _refusal

    assert "wait until it ends, stop it, or give another --workdir" in _refusal(tmp_path, {})


def test_minutes_are_given_as_it_is_told(tmp_path, cpu, monkeypatch):
    for name in ("total_steps", "passes"):
        line = refusal(train, build_config(minutes=3), tmp_path / "new", cpu, overrides={name})
        assert re.search(rf"{name} must not be given where minutes=3 decide it; leave out one$", line)
    decided = []
    monkeypatch.setattr(autotune, "find_best", lambda config, *_: decided.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # one is left out: minutes alone decide
        train(build_config(minutes=3, **SMALL), tmp_path / "new", cpu, overrides=set())
    assert decided
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    line = refusal(autotune.autotune, build_config(minutes=3), tmp_path / "more", cpu, 0.0)
    told = re.search(r"minutes=3 must be (0) where several processes train; set (--config\.passes=1) instead$", line)
    assert told and not build_config(minutes=float(told[1]), **flags_in(told[2])).minutes  # no autotune then


def test_records_go_where_it_is_told(tmp_path, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    off = build_config().metrics

    def opened(folder: str, **changes: Any) -> None:
        (tmp_path / folder).mkdir()
        open_sinks(dataclasses.replace(off, **changes), tmp_path / folder, {}).close()

    for (
        module,
        change_,
    ) in (("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "offline"})):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            extra = re.search(r"(?:\[|EXTRAS=\S*\b)(\w+)\]?'?$", refusal(opened, f"no {module}", **change_))
        assert extra and any(re.match(rf"{module}\b", requirement) for requirement in extras[extra[1]])
    opened("tensorboard", tensorboard=True)
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    line = refusal(opened, "a", wandb="online")
    told = re.search(r"set (\w+), or set --config\.metrics\.wandb=(\w+)$", line)
    assert told and told[1] == "WANDB_API_KEY" and told[2] in SETTINGS["metrics.wandb"].choices

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", fail)
    mode = "online"
    for folder in ("b", "c"):
        mode = re.search(r"try --config\.metrics\.wandb=(\w+)$", refusal(opened, folder, wandb=mode))[1]
    assert mode == "off"
    opened("d", wandb=mode)


# Plans.


@pytest.mark.slow
def test_a_run_is_made_smaller_as_advised_until_it_fits(cpu, monkeypatch):
    """On a Mac, where the peak is that of the step; memory that ran out is answered by flags that were not tried."""
    config = build_config(**SMALL | {"batch_size": 16, "model.num_layers": 2, "model.seq_len": 256}).with_total_steps()
    mac = for_mac(cpu, 10**12)
    monkeypatch.setattr(plan_module, "choose_precision", lambda backend, precision: (precision, "asked for"))
    whole = make_plan(config, mac, timed=False, precision=("float32", ""))
    for share in (0.9, 0.0):
        tight = dataclasses.replace(mac, memory=whole.peak_bytes - int((1 - share) * whole.memory.activations))
        with pytest.raises(ValueError, match="this run needs") as caught:
            check_fits(config, tight)
        line = str(caught.value)
        if "make the model smaller" in line:
            break
        advised = [flags_in(part) for part in re.findall(r"--config\S+(?: --config\S+)*", line)]
        assert advised[-1] == {"backend.ignore_memory": True}
        check_fits(change(config, advised[0]), tight)
        check_fits(change(config, advised[-1]), tight)
    assert share < 0.9
    smaller, sizes = config, []
    while flags := re.findall(r"--config\S+(?: --config\S+)*", remedies(smaller)):
        smaller = change(smaller, flags_in(flags[0]))
        sizes.append(make_plan(smaller, mac, timed=False, precision=("float32", "")).peak_bytes)
    assert len(sizes) == 5 and sizes[-1] < sizes[0] < whole.peak_bytes
    line = remedies(smaller)
    for name in re.search(r"lower (.*) or ([\w.]+) \(", line).groups():
        for setting in name.split(", "):
            assert setting in SETTINGS
    half = change(smaller, {"model.embed_dim": 16, "model.mlp_dim": 0, "tokenizer.vocab_size": 300})
    assert make_plan(half, mac, timed=False, precision=("float32", "")).peak_bytes < sizes[-1]


@pytest.mark.slow
def test_a_plan_knows_its_length_when_it_is_set(cpu, capsys, monkeypatch):
    monkeypatch.setattr(plan_module, "find_advice", lambda *_: ())
    shape = SMALL | {"corpus.name": "files", "corpus.path": "none", "total_steps": 0}
    made = make_plan(build_config(**shape), cpu, timed=False)
    print_plan(made)
    assert "(or set total_steps)" in capsys.readouterr().out
    print_plan(dataclasses.replace(made, total_steps=7, tokens=7 * made.tokens_per_step))
    out = capsys.readouterr().out
    assert "7 steps" in out
    length = build_config(**shape | {"total_steps": 7}).with_total_steps()
    assert length.length_known and length.total_steps == 7


# Samples and scores.


@pytest.fixture(scope="module")
def opened(trained, cpu):
    return open_experiment(trained, cpu)


@pytest.mark.slow
def test_samples_are_asked_for_as_it_is_told(opened):
    sampler = Sampler(opened.model, opened.params, opened.tokenizer)
    few = SampleSettings(max_tokens=2)
    for name, value in (("num_samples", 0), ("seed", 1 << 32), ("seed", -1)):
        told = re.search(rf"try --{name}=(\d+)$", refusal(sampler.stream, "", few, **{name: value}))
        assert told and sampler.sample("", few, **{name: int(told[1])})
    settings = {"max_tokens": 0, "temperature": float("nan"), "top_k": -1, "top_p": 0.0, "min_p": 2.0}
    for name, value in (settings | {"repetition_penalty": 0.0}).items():
        told = re.search(rf"try --{name}=([\d.]+)$", refusal(SampleSettings, **{name: value}))
        assert told and SampleSettings(**{name: type(value)(told[1])})
    told = re.search(r"try --stop='(.+)'$", refusal(SampleSettings, stop=["", "."]))
    assert told and SampleSettings(stop=[told[1]])
    assert "leave it out to start a document" in refusal(sampler.stream, " \n", few)
    long = "Once upon a time " * 200
    told = re.search(r"--(long_prompt)=(\w+)$", refusal(sampler.stream, long, few))
    assert told and sampler.sample(long, dataclasses.replace(few, **{told[1]: told[2]}))
    assert sampler.sample("Once upon a time", few)  # shortened


def test_weights_that_are_no_numbers_and_an_earlier_step(opened, run, cpu):
    broken = jax.tree_util.tree_map(lambda x: x * float("nan"), opened.params)
    few = SampleSettings(max_tokens=2)
    assert refusal(Sampler(opened.model, broken, opened.tokenizer).sample, "", few).endswith("optimizer.learning_rate")
    assert open_experiment(run, cpu, step=10).earlier_step == 0
    sampler = Sampler(opened.model, broken, opened.tokenizer, earlier_step=opened.earlier_step)
    told = re.search(r"try --step=(\d+)$", refusal(sampler.sample, "", few))
    assert told
    earlier = open_experiment(run, cpu, step=int(told[1]))
    assert Sampler(earlier.model, earlier.params, earlier.tokenizer).sample("", SampleSettings(max_tokens=2))


def test_an_evaluation_is_refused_before_it_scores_and_goes_as_told(opened, run, cpu, monkeypatch):
    experiment = dataclasses.replace(opened, workdir=run)

    def result(**changes: Any) -> Any:
        return evaluate(experiment, **{"num_samples": 0} | changes)

    with monkeypatch.context() as patch:
        patch.setattr("tale_jax.evaluation.scoring.Evaluation.__call__", None)  # nothing is scored
        lines = {
            "stride": refusal(result, stride=9999),
            "seed": refusal(result, seed=1 << 32),
            "sample_temperature": refusal(result, sample_temperature=float("nan")),
        }
        patch.setattr("tale_jax.evaluation.quality_samples.MIN_TEXTS", 10**6)
        line = refusal(result, with_quality=True)
        patch.setattr("tale_jax.evaluation.quality_samples.MIN_TEXTS", 200)
        assert refusal(result, with_quality=True, split="test")
    assert not (run / "evaluations.jsonl").exists()
    named = re.search(r"try another --(split), or give more text, or raise ([\w.]+) \(of tales: ([\w.]+)\)", line)
    assert named and named[2] in SETTINGS and named[3] in SETTINGS
    advised = {}
    for name, said in lines.items():
        told = re.search(rf"try --{name}=([\d.]+)$", said)
        assert told, said
        advised[name] = float(told[1]) if name == "sample_temperature" else int(told[1])
    assert result(**advised)["stride"] == advised["stride"]


# Benchmarks.


@pytest.fixture(scope="module")
def subject(cpu):
    return Bench(build_config(**SMALL), cpu)


@pytest.mark.slow
def test_benchmarks_are_asked_for_as_it_is_told(subject, tmp_path, monkeypatch):
    told = re.search(r"try --sweep=(\S+)$", refusal(lambda: list(sweep_variants(["batch_size"]))))
    assert told and [variant["model.embed_dim"] for variant in sweep_variants([told[1]])] == ["192", "384", "768"]
    told = re.search(r"try --only=(\S+)$", refusal(BenchRequest, ("train", "trains"), 1.0))
    assert told and BenchRequest(tuple(told[1].split(",")), 1.0).kinds == ("train", "decode_16")
    for kind in ("decode_x", "decode_0", "score_2"):
        assert "must be train, score, decode or decode_N" in refusal(subject.rate, kind, 0.0)
    both = {"sweeps": ("seed=0,1",), "profile": True}
    line = refusal(BenchRequest, ("train",), 1.0, **both)
    assert line.startswith("--profile and --sweep cannot be measured together; give one of them")
    assert all(BenchRequest(("train",), 1.0, **{name: value}) for name, value in both.items())
    config, request = build_config(**SMALL), BenchRequest(("score",), 0.0, profile=True)
    assert refusal(bench, config, request, tmp_path / "x.png").endswith("leave it out here")
    # A peer that measures something else, nothing, or no rate.
    peer = tmp_path / "peer.py"
    command = f"{sys.executable} {peer}"
    printed = 'import json\nprint(json.dumps({"kind": "%s", "mode": "x", "tokens_per_s": %s}))'
    monkeypatch.setattr(subject, "rate", lambda kind, seconds: type("Rate", (), {"tokens_per_second": 10.0}))
    peer.write_text(printed % ("decode", 5))
    told = re.search(r"try --only=(\S+)$", refusal(compare, subject, command, 1, 0.0, ["score"]))
    assert told and compare(subject, command, 1, 0.0, told[1].split(",")).ratios() == {"decode": [2.0]}
    peer.write_text("print('{}')")
    told = re.search(r"let it print (\w+), (\w+) and (\w+)$", refusal(compare, subject, command, 1, 0.0, ["score"]))
    assert told
    record = dict(zip(told.groups(), ("score", "x", 5), strict=True))
    peer.write_text(f"import json\nprint(json.dumps({record}))")
    assert compare(subject, command, 1, 0.0, ["score"]).ratios() == {"score": [2.0]}
    monkeypatch.undo()
    # A platform whose traces name no instruction.
    with monkeypatch.context() as patch:
        patch.setattr("tale_jax.bench.profile.instruction_op_names", lambda hlo: {})
        assert flags_in(refusal(profile, subject)) == {"backend.platform": "cpu"}
    assert profile(subject).parts


@pytest.mark.slow
def test_what_a_benchmark_could_not_run_can_be_run_by_itself(subject, tmp_path, monkeypatch):
    peer = tmp_path / "peer.py"
    command = f"{sys.executable} {peer}"
    for rate in ("0", "-1", "NaN", '"fast"'):
        peer.write_text(f"""print('{{"kind": "score", "mode": "x", "tokens_per_s": {rate}}}')""")
        monkeypatch.setattr(subject, "rate", lambda kind, seconds: type("Rate", (), {"tokens_per_second": 10.0}))
        line = refusal(compare, subject, command, 1, 0.0, ["score"])
        assert line.startswith(f"--peer={command}") and "run it by itself" in line
    peer.write_text("import sys\nsys.exit('needs --speed')")
    line = refusal(run_json_lines, shlex.split(command))
    itself = shlex.split(line.partition(" ended with ")[0])
    done = subprocess.run(itself, capture_output=True, text=True)
    assert "run it by itself" in line and done.stderr.strip() == "needs --speed"
    # Scripts that --startup runs; run by themselves they say what is wrong.
    wrong = ["--config=configs/tales.py:tiny", "--config.model.num_heads=7"]
    line = refusal(compare_module.startup, wrong)
    assert line.startswith("--startup: launch/prepare.py ended with") and "model.num_heads=7" in line
    for script, first in (
        ("train", lambda: compare_module.first_step(wrong, tmp_path / "new", tmp_path / "cache")),
        ("sample", lambda: compare_module.first_text(tmp_path / "new", tmp_path / "cache")),
    ):
        line = refusal(first)
        assert line.startswith(f"--startup: launch/{script}.py") and line.endswith(
            "run it by itself to see what it says"
        )
        flags = wrong if script == "train" else []
        itself = [sys.executable, f"launch/{script}.py", *flags, f"--workdir={tmp_path / 'new'}"]
        assert subprocess.run(itself, cwd=ROOT, capture_output=True, text=True).stderr.startswith("error: ")


# Calls from Python.


def test_calls_of_python_are_corrected_as_they_are_told(opened, tmp_path, monkeypatch):
    told = re.search(r"is not one of (\w+), .*; use one of these$", refusal(grammar.tell, 0, "dev", 0))
    assert told and grammar.tell(0, told[1], 0)
    told = re.search(r"count tales from (\d+)$", refusal(grammar.tell, -1, "train", 0))
    assert told and grammar.tell(int(told[1]), "train", 0)
    told = re.search(r"try (\d+)$", refusal(grammar.entropy, 1))
    assert told and int(told[1]) >= 2 and grammar.entropy(2)
    sampler = Sampler(opened.model, opened.params, opened.tokenizer)
    told = re.search(r"give \['(.*)'\] to start a document$", refusal(sampler.stream_prompts, [], SampleSettings()))
    assert told and list(sampler.stream_prompts([told[1]], SampleSettings(max_tokens=1)))
    told = re.search(r"try --memory=(\w+)$", refusal(parse_bytes, "lots"))
    assert told and parse_bytes(told[1]) == 8 * 10**9
    tokens = np.arange(4)
    needed = re.search(r"at least (\d+) tokens, but has 4; give more text$", refusal(NgramModel, tokens, 9))
    assert needed and NgramModel(np.arange(int(needed[1])), 9)
    checkpoints = Checkpoints(tmp_path / "run", 1)
    trainer = tiny_trainer()
    wanted = trainer.abstract_state, trainer.state_shardings
    assert refusal(checkpoints.restore, *wanted).endswith("must hold a checkpoint; train first")
    checkpoints.save(1, trainer.init(), {}, None)  # as training does
    assert checkpoints.restore(*wanted)
    checkpoints.close()
    # A manifest that the disk does not give back; when it does, it is read.
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_text("x")
    write_manifest(tmp_path / "files", {})

    def refuse(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert refusal(read_manifest, tmp_path / "files") == f"{MANIFEST} cannot be read (Input/output error)"
    assert read_manifest(tmp_path / "files")["files"]
