"""A sweep of runs: what varies is read and checked, runs are named, stopped and go on, and failures stop no other."""

import dataclasses
import json
import os
import signal
import tempfile
import threading
import time
from contextlib import ExitStack

import pytest
from helpers import build_config, run_script, start_script

from configs import tales
from tale_jax.runs.engines import jobs as jobs_module
from tale_jax.runs.engines import slurm as slurm_module
from tale_jax.runs.engines.jobs import Job, Resources, end_of, last_line, make_engine, make_job, slots
from tale_jax.runs.engines.local import LocalEngine
from tale_jax.runs.evaluate import score_valid
from tale_jax.runs.sweep import (
    MAX_NAME_CHARS,
    Result,
    Sweep,
    markdown,
    name_of,
    named_runs,
    parse_sweeps,
    print_sweep,
    run_sweep,
)
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.signals import StopSignals

FLAGS = ["--config=configs/tales.py:tiny", "--config.model.num_layers=1", "--config.precision=float32"]
SHORT = ["--config.total_steps=6", "--config.evaluate.every_steps=2", "--config.checkpoint.every_steps=2"]


class NoEngine:
    """Starts nothing; keeps the jobs."""

    def __init__(self):
        self.jobs = []

    def run(self, jobs, on_end, signals):
        self.jobs += jobs


def tiny(**changes):
    recipe = tales.get_config("tiny")
    recipe.update_from_flattened_dict(changes)
    return recipe.to_dict()


def test_values_are_read_in_the_type_of_their_setting():
    texts = ["optimizer.learning_rate=1e-3, 2e-3", "seed=0,1", "model.mask_documents=true,False", "model.dropout=0"]
    parsed = parse_sweeps([*texts, 'lora.matrices="query,value",query,'])
    assert parsed["optimizer.learning_rate"] == [0.001, 0.002] and parsed["seed"] == [0, 1]
    assert parsed["model.mask_documents"] == [True, False] and isinstance(parsed["model.dropout"][0], float)
    assert parsed["lora.matrices"] == ["query,value", "query", ""]
    assert parse_sweeps(["--config.seed=3"]) == {"seed": [3]}  # as it is typed elsewhere


@pytest.mark.parametrize(
    ("texts", "message", "remedied"),
    [
        ([], "^sweep= must name what varies; try --sweep=optimizer.learning_rate=1e-3,2e-3$", ["seed=0"]),
        (["seed"], '^sweep="seed" must have the form NAME=VALUE,VALUE; try --sweep=seed=0,1$', ["seed=0,1"]),
        (["lr=1"], r"^--sweep=lr=1: lr is not a setting; did you mean optimizer\.learning_rate\?$", ["seed=0"]),
        (["seed=a"], '^seed="a" must be of type int; try --sweep=seed=0$', ["seed=0"]),
        (["seed="], '^seed="" must be of type int; try --sweep=seed=0$', ["seed=0"]),
        (["seed=1.5"], '^seed="1.5" must be of type int', ["seed=0"]),
        (["model.tie=1"], "^--sweep=model.tie=1: model.tie is not a setting; ", ["seed=0"]),
        (["model.mask_documents=7"], "^model.mask_documents=.* must be of type bool", ["model.mask_documents=true"]),
        (["seed=1,-1"], "^seed=-1 must not be negative; try 0", ["seed=1,0"]),
        (["optimizer.learning_rate=nan"], "^optimizer.learning_rate=nan must ", ["seed=0"]),
        (["optimizer.name=adamm"], "^optimizer.name=.*did you mean adamw", ["optimizer.name=adamw"]),
        (["seed=1,01"], "^seed=1 must stand once in --sweep=seed=1,01; leave the second one out$", ["seed=1"]),
        (["seed=0,0"], "^seed=0 must stand once in", ["seed=0"]),
        (["seed=1", "seed=2"], "^--sweep=seed must be given once; write all values behind one", ["seed=1,2"]),
    ],
)
def test_what_cannot_be_swept_is_one_line(texts, message, remedied):
    with pytest.raises(ValueError, match=message):
        parse_sweeps(texts)
    assert parse_sweeps(remedied)


def test_a_setting_with_a_flag_of_its_own_does_not_vary():
    with pytest.raises(ValueError, match=r"^seed must not be one value .*; leave --config\.seed out$"):
        parse_sweeps(["seed=0,1"], ["seed"])
    assert parse_sweeps(["seed=0,1"], ["batch_size"])


def test_too_many_runs():
    with pytest.raises(ValueError, match=r"^sweep= must be at most 1000 runs, .* make 1001; leave some out$"):
        named_runs({"seed": range(1001)})
    assert len(named_runs({"seed": range(10), "batch_size": range(100)})) == 1000


def test_runs_are_named_by_what_varies():
    sweeps = parse_sweeps(["optimizer.learning_rate=1e-3,2e-3", "seed=0,1"])
    assert list(named_runs(sweeps)) == [
        f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.002) for seed in (0, 1)
    ]
    assert name_of({"model.dropout": 0.1, "lora.dropout": 0.2}) == "model.dropout=0.1,lora.dropout=0.2"
    odd = [name_of({"corpus.path": path}) for path in ("a/b", "a_b", "a b", "../x", "x" * 300, "y\n", "ü")]
    assert len(set(odd)) == len(odd) and all("/" not in name and name.isprintable() for name in odd)
    assert odd[1] == "path=a_b" and max(map(len, odd)) <= MAX_NAME_CHARS + 9


def test_all_runs_are_checked_before_one_starts(tmp_path):
    engine = NoEngine()
    with pytest.raises(ValueError, match=r"^run embed_dim=65: model\.embed_dim=65 must .*"):
        run_sweep(tiny(), ["model.embed_dim=64,65"], tmp_path / "out", engine)
    with pytest.raises(
        ValueError, match=r"^mesh\.processes=2 must be 0 in a sweep.*; leave --config\.mesh\.processes out$"
    ):
        run_sweep(tiny(**{"mesh.processes": 2}), ["seed=0,1"], tmp_path / "out", engine)
    assert not engine.jobs and not (tmp_path / "out").exists()
    assert run_sweep(tiny(), ["model.embed_dim=64,128"], tmp_path / "out", engine).failed == 0
    assert [job.name for job in engine.jobs] == ["embed_dim=64", "embed_dim=128"]


def test_a_sweep_grows_and_refuses_other_settings(tmp_path):
    out, engine = tmp_path / "out", NoEngine()
    run_sweep(tiny(), ["seed=0,1"], out, engine)
    sweep = run_sweep(tiny(), ["seed=1,2"], out, engine)
    assert [result.name for result in sweep.results] == ["seed=0", "seed=1", "seed=2"]
    assert [job.name for job in engine.jobs] == ["seed=0", "seed=1", "seed=1", "seed=2"]
    refusal = (
        r"^batch_size=8 must be 4 to go on with the sweep in .*; set --config\.batch_size=4, or give another --out$"
    )
    with pytest.raises(ValueError, match=refusal):
        run_sweep(tiny(batch_size=8), ["seed=0,1"], out, engine)
    with pytest.raises(ValueError, match=r"holds a sweep over seed; sweep over the same, or give another --out$"):
        run_sweep(tiny(), ["seed=0", "batch_size=4,8"], out, engine)
    run_sweep(tiny(), ["seed=0", "batch_size=4,8"], tmp_path / "other", engine)
    (out / "sweep.json").write_text("[")
    with pytest.raises(ValueError, match=r"sweep\.json must be JSON .*; give another --out$"):
        run_sweep(tiny(), ["seed=0"], out, engine)


def test_what_follows_from_a_varied_setting_is_not_another_sweep(tmp_path):
    """`micro_batch_size` and `evaluate.batch_size` follow from `batch_size`."""
    out, engine = tmp_path / "out", NoEngine()
    run_sweep(tiny(batch_size=4), ["batch_size=4,8"], out, engine)
    run_sweep(tiny(batch_size=4), ["batch_size=4,8,16"], out, engine)
    settings = json.loads((out / "settings" / "batch_size=16" / "config.json").read_text())
    assert settings["micro_batch_size"] == settings["evaluate"]["batch_size"] == settings["batch_size"] == 16


def test_a_text_that_several_runs_read_is_prepared_once(tmp_path):
    few = {f"corpus.num_{split}_tales": 40 for split in ("train", "valid", "test")}
    sweeps = ["optimizer.learning_rate=1e-3,2e-3", "tokenizer.vocab_size=400,100000"]  # not so many words in this text
    run_sweep(tiny(**few), sweeps, tmp_path, NoEngine())
    files = list(tmp_path.glob("runs/*/windows/train.bin"))
    assert len(files) == 2 and files[0].samefile(files[1])
    grown = [sweeps[0] + ",3e-3", sweeps[1]]
    run_sweep(tiny(**few), grown, tmp_path, NoEngine())
    assert files[0].stat().st_nlink == 4  # that of the folder `text` among them


RESULTS = (
    Result("seed=1", {"seed": 1}, "done", 1.25, 2.5, 20, 16640, 61.0),
    Result("seed=0", {"seed": 0}, "failed", None, None, 0, 0, None, "exit code 2: error: a | b"),
)


def test_the_table(capsys, tmp_path):
    lines = markdown(Sweep(("seed",), RESULTS)).splitlines()
    assert lines[0] == "| seed | bits/byte | nats/token | steps | tokens | time | state |"
    assert lines[2:4] == ["| 1 | 1.2500 | 2.5000 | 20 | 16,640 | 1:01 | done |", "| 0 | – | – | 0 | 0 | – | failed |"]
    assert lines[-1] == "- seed=0: exit code 2: error: a | b"
    print_sweep(Sweep(("seed",), RESULTS), tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["runs"][0]["bits_per_byte"] == 1.25
    print_sweep(Sweep(("seed",), RESULTS), tmp_path)
    out = capsys.readouterr().out
    assert "seed=0 failed, exit code 2: error: a | b" in out and f"the best: {tmp_path}/runs/seed=1" in out


def test_resources_that_this_machine_lacks_are_named(monkeypatch):
    monkeypatch.setattr(jobs_module, "total_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(jobs_module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    for resources, remedy in {
        Resources(cpus=5): "try --cpus=4",
        Resources(memory=9 * 10**9): "try --memory=8000MB",
        Resources(gpus=4): "try --gpus=3",
        Resources(cpus=-1): "leave --cpus out",
    }.items():
        with pytest.raises(ValueError, match=f" must .*; {remedy}$"):
            make_engine("local", resources)
    assert slots(Resources(cpus=2)) == (2, []) and slots(Resources(memory=3 * 10**9)) == (2, [])
    assert slots(Resources(gpus=1)) == (3, [["0"], ["3"], ["5"]]) and slots(Resources(gpus=2)) == (1, [["0", "3"]])
    assert make_engine("local", Resources()).num_slots == 1 and make_engine("local", Resources(), 0).num_slots == 4
    assert make_engine("local", Resources(cpus=2), 7).num_slots == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"the GPUs that are found here; leave --gpus out$"):
        make_engine("local", Resources(gpus=1))


def test_engines_say_what_they_need(monkeypatch):
    with pytest.raises(ValueError, match=r"^--stop_early must go with Ray, .* --engine=local; set --engine=ray$"):
        make_engine("local", Resources(), stop_early=True)
    monkeypatch.setattr(jobs_module, "has_library", lambda _: False)
    with pytest.raises(
        ValueError, match=r"^--engine=ray needs Ray, which is not installed; .*; or leave --engine out$"
    ):
        make_engine("ray", Resources(), stop_early=True)
    assert make_engine("local", Resources())


def test_how_a_process_ended(tmp_path):
    assert [end_of(code).reason for code in (0, 2, -9)] == ["", "exit code 2", "signal 9"]
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 200_000 + "\nerror:  it\tfailed \n\n")
    assert last_line(log) == "error: it failed"


def test_a_job_is_a_command_that_can_be_typed(tmp_path):
    config = build_config(**{"model.mask_documents": False})
    job = make_job("a", config, dict.fromkeys(["model.mask_documents", "seed"]), tmp_path / "runs" / "a", tmp_path)
    assert job.command[2:3] == (f"--config={jobs_module.SAVED_CONFIG}:{tmp_path}/settings/a",)
    assert job.command[3:5] == ("--config.model.mask_documents=False", "--config.seed=0")
    assert dataclasses.replace(job, workdir=tmp_path / "b").score == tmp_path / "b" / "score.json"


def commands(folder, **scripts):
    """Jobs of so many shell commands."""
    made = []
    for name, script in scripts.items():
        made.append(Job(name, ("sh", "-c", script), folder / "runs" / name, folder / f"{name}.txt", folder))
    return made


def ran(engine, made):
    """How each job ended, and the signal that stopped them."""
    ends = {}
    with StopSignals() as signals:
        engine.run(made, lambda job, end: ends.update({job.name: end.reason}), signals)
    return ends, signals.number


def test_processes_run_at_once_and_end_on_their_own(tmp_path):
    meet = (
        "touch {0}; for i in $(seq 200); do [ -e {1} ] && exit 0; sleep 0.05; done; exit 9"  # each waits for the other
    )
    made = commands(tmp_path, a=meet.format("x", "y"), b=meet.format("y", "x"), c="echo 'error: no' >&2; exit 2")
    assert ran(LocalEngine(2, 4), made) == ({"a": "", "b": "", "c": "exit code 2"}, 0)
    assert last_line(made[2].log) == "error: no"


def test_a_signal_lets_processes_save_and_starts_no_other(tmp_path):
    save = f"trap 'echo saved; exit 143' TERM; kill {os.getpid()}; while :; do sleep 0.05; done"
    made = commands(tmp_path, a=save, b="echo started")
    assert ran(LocalEngine(1, 1), made) == ({"a": "exit code 143"}, signal.SIGTERM)
    assert last_line(made[0].log) == "saved" and not made[1].log.exists()


def test_a_run_of_another_process_is_waited_for(tmp_path, capsys):
    made = commands(tmp_path, a="echo a", b=f"sleep 0.3; touch {tmp_path}/b")
    with ExitStack() as held:
        held.enter_context(writer_lock(made[0].workdir, "train"))
        release = threading.Timer(1.0, held.close)
        release.start()
        assert ran(LocalEngine(1, 1), made) == ({"a": "", "b": ""}, 0)
        release.join()
    assert "is in use by another process; its run is waited for" in capsys.readouterr().err
    assert made[0].log.stat().st_mtime_ns > (tmp_path / "b").stat().st_mtime_ns  # the other one has not waited


def test_a_score_that_was_damaged(tmp_path):
    run_sweep(tiny(), ["seed=0"], tmp_path, NoEngine())
    score = tmp_path / "runs" / "seed=0" / "score.json"
    score.parent.mkdir(parents=True)
    score.write_text("{")
    with pytest.raises(ValueError, match=r"score\.json must be JSON .*; remove it, and the run is scored again$"):
        run_sweep(tiny(), ["seed=0"], tmp_path, NoEngine())
    score.unlink()
    engine = NoEngine()
    run_sweep(tiny(), ["seed=0"], tmp_path, engine)
    assert [job.name for job in engine.jobs] == ["seed=0"]


def test_only_one_process_scores(tmp_path, cpu, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"^--score must be left to one process, and 2 .*; leave it out, and run launch/"
    ):
        score_valid(tmp_path, cpu, 1, tmp_path / "score.json")


def test_runs_of_unknown_length_are_not_stopped_early(tmp_path):
    pytest.importorskip("ray", reason="make env EXTRAS=dev,ray installs it")
    with pytest.raises(ValueError, match=r"^total_steps=0 must be known .*; try --config\.total_steps=1000$"):
        ran(make_engine("ray", Resources(), stop_early=True), commands(tmp_path, a="true"))


PROGRAMS = {  # of a cluster that has no accounting, and one job
    "sbatch": "cat > {0}/script; echo \"$@\" > {0}/flags; echo '7;cluster'",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "scontrol": "echo JobId=7 JobName=a JobState=$(cat {0}/state) ExitCode=2:0; echo COMPLETED > {0}/state",
}


def cluster(folder, monkeypatch, **programs):
    folder.mkdir()
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script.format(folder)}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(slurm_module, "POLL_SECONDS", 0.1)


def test_a_cluster_that_takes_no_job_is_one_line(tmp_path, monkeypatch):
    cluster(tmp_path / "bin", monkeypatch, sbatch="echo 'sbatch: error: invalid partition' >&2; exit 1")
    refusal = (
        r"^Slurm takes no job \(exit code 1: sbatch: error: invalid partition\); see `sinfo`, or leave --engine out$"
    )
    with pytest.raises(ValueError, match=refusal):
        ran(make_engine("slurm", Resources()), commands(tmp_path, a="true"))
    assert ran(make_engine("local", Resources()), commands(tmp_path, a="true")) == ({"a": ""}, 0)


def test_jobs_of_slurm_are_watched_without_accounting(tmp_path, monkeypatch):
    cluster(tmp_path / "bin", monkeypatch, **PROGRAMS)
    (tmp_path / "bin" / "state").write_text("RUNNING")
    [job] = commands(tmp_path, a="echo 'two words'")
    ends, _ = ran(make_engine("slurm", Resources(cpus=2, gpus=1, memory=1 << 30)), [job])
    assert ends == {"a": "COMPLETED, exit code 2"}  # with no score it has failed, whatever Slurm calls it
    flags = (tmp_path / "bin" / "flags").read_text()
    assert (
        "--parsable" in flags and "--cpus-per-task=2 --gpus=1 --mem=1024M" in flags and f"--output={job.log}" in flags
    )
    script = (tmp_path / "bin" / "script").read_text()
    assert """sh -c 'echo '"'"'two words'"'"''""" in script and "scontrol requeue" in script
    (tmp_path / "bin" / "state").write_text("PENDING")
    (tmp_path / "bin" / "sbatch").unlink()  # the job that an earlier command has submitted is found
    job.workdir.mkdir(parents=True)
    job.score.write_text("{}")
    assert ran(make_engine("slurm", Resources()), [job]) == ({"a": ""}, 0)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_and_tells_what_failed(tmp_path):
    out = tmp_path / "sweep"
    flags = [*FLAGS, *SHORT, "--config.corpus.num_valid_tales=40", f"--out={out}"]
    varied = ["--sweep=seed=0,1", "--sweep=tokenizer.vocab_size=512,100000"]  # no text of this size has so many words
    process = start_script("sweep", *flags, *varied)
    deadline = time.monotonic() + 300
    while not list(out.glob("runs/seed=0,vocab_size=512/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in stderr, stderr
    assert not list(out.glob("runs/*/score.json"))
    done = run_script("sweep", *flags, *varied, "--json")
    assert done.returncode == 1, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [run["state"] for run in runs] == ["done", "done", "failed", "failed"]
    assert runs[0]["bits_per_byte"] <= runs[1]["bits_per_byte"] and {run["steps"] for run in runs[:2]} == {6}
    assert all(run["reason"].startswith("exit code 2: error: tokenizer.vocab_size=100000 must") for run in runs[2:])
    assert json.loads((out / "results.json").read_text())["runs"] == runs
    assert "Settings that differ" in (out / "report.html").read_text()
    assert (out / "results.md").read_text().count("| done |") == 2
    scores = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/score.json")}
    again = run_script("sweep", *flags, "--sweep=seed=1,0", "--sweep=tokenizer.vocab_size=512")
    assert again.returncode == 0 and "the best: " in again.stdout, again.stderr
    assert scores == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/score.json")}


@pytest.mark.slow
def test_ray_gives_the_same_table_and_stops_runs_that_are_worse(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="make env EXTRAS=dev,ray installs it")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets have short names
        monkeypatch.setenv("RAY_TMPDIR", folder)
        tables = []
        for engine in ("ray", "local"):
            flags = [*FLAGS, *SHORT, f"--out={tmp_path / engine}", f"--engine={engine}", "--sweep=seed=0,1"]
            if engine == "ray":
                process = start_script("sweep", *flags)
                deadline = time.monotonic() + 300
                while not list(tmp_path.glob("ray/runs/*/metrics.jsonl")):
                    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                _, stderr = process.communicate(timeout=120)
                assert process.returncode == 143 and "Traceback" not in stderr, stderr
            done = run_script("sweep", *flags, "--json")
            assert done.returncode == 0, done.stderr
            runs = json.loads(done.stdout.splitlines()[-1])["runs"]
            tables.append([run | {"seconds": None} for run in runs])
        assert tables[0] == tables[1] and len(tables[0]) == 2
        long = ["--config.total_steps=90", "--config.evaluate.every_steps=5", f"--out={tmp_path / 'asha'}"]
        rates = "--sweep=optimizer.learning_rate=3e-3,1e-5,2e-5,3e-5"
        done = run_script("sweep", *FLAGS, *long, rates, "--engine=ray", "--stop_early", "--jobs=1", "--json")
        assert done.returncode == 0, done.stderr
        runs = json.loads(done.stdout.splitlines()[-1])["runs"]
        assert runs[0]["values"] == {"optimizer.learning_rate": 3e-3} and runs[0]["state"] == "done"
        assert {run["state"] for run in runs[1:]} == {"stopped early"}  # one at a time: each is worse than the first
        assert all(10 <= run["steps"] < 90 for run in runs[1:])
