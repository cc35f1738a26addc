"""A ladder of small runs: what it trains, what it says, that it goes on where it was stopped, and its mistakes."""

import dataclasses
import json
import math
import signal
import time

import pytest
from helpers import build_config, run_script, start_script

from tale_jax.data.token_files import load_manifest
from tale_jax.planning.autotune import StepCost
from tale_jax.planning.scaling_law import LossLaw, known_law
from tale_jax.runs import ladder as ladder_module
from tale_jax.runs.engines.jobs import End
from tale_jax.runs.ladder import Ladder, describe_ladder, run_ladder

RECIPE = ["--config=configs/tales.py:tiny", "--config.precision=float32", "--config.batch_size=2"]
SHORT = ["--config.model.seq_len=64", "--config.windows=stream", "--config.model.mask_documents=False"]


class KillingEngine:
    """Every run is killed before it has said anything."""

    def run(self, jobs, on_end, signals):
        for job in jobs:
            on_end(job, End("signal 9"))


def run_of(**changes):
    run = {"num_layers": 2, "embed_dim": 64, "num_weights": 1_100_000, "tokens": 2_500_000, "passes": 1.5}
    return run | {"bits_per_byte": 1.5, "predicted": 1.48, "lower": 1.45, "upper": 1.52, "seconds": 60.0} | changes


def test_a_ladder_is_told_in_lines():
    answer = run_of(others=[run_of(num_weights=400_000, bits_per_byte=1.6)])
    ladder = Ladder(480.0, 0.15, {"a": run_of()}, run_of(), answer, run_of(bits_per_byte=1.53), {}, 0.01, 0.141)
    lines = describe_ladder(ladder).splitlines()
    assert lines[0].startswith("In 8 h") and "1.1M weights" in lines[0]
    assert lines[0].endswith("1.500 bits/byte (1.450 to 1.520)")
    assert lines[1].startswith("  instead 400k weights")
    assert lines[2].endswith("1.480 (1.450 to 1.520), measured 1.500 bits/byte (+1.4%)")
    assert lines[3].startswith("The run of 8 h 0 min, predicted before: ") and lines[3].endswith(
        "measured 1.530 bits/byte (+3.4%)"
    )
    assert lines[4] == "The steps of the rungs took 14.1% of that time."


@pytest.mark.parametrize("name", ["total_steps", "model.embed_dim", "passes"])
def test_sizes_and_lengths_are_not_given(tmp_path, cpu, name):
    with pytest.raises(ValueError, match=rf"^{name} is what a ladder chooses; leave --config\.{name} out$"):
        run_ladder(build_config(), tmp_path / "out", cpu, overrides=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("share", 0.0), ("share", 1.0), ("minutes", 0.0), ("minutes", -1.0)])
def test_shares_and_minutes_that_cannot_be(tmp_path, cpu, field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value:g} must be above 0.*; try --{field}=(0\.15|480)$"):
        run_ladder(build_config(), tmp_path / "out", cpu, **{field: value})


def test_a_plan_that_was_damaged(tmp_path, cpu):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json must be JSON .*; give another --out$"):
        run_ladder(build_config(), tmp_path, cpu)


@pytest.mark.slow
def test_minutes_that_are_too_few_name_enough(tmp_path, cpu):
    config = build_config(precision="float32", batch_size=2)
    with pytest.raises(ValueError, match=r"leave each rung 50 steps; try --minutes=\d+$") as raised:
        run_ladder(config, tmp_path / "out", cpu, minutes=1.0, share=0.01)
    enough = int(str(raised.value).rpartition("=")[2])
    assert enough > 1 and not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.slow
def test_a_model_that_fits_into_no_memory(tmp_path, cpu):
    config = build_config(precision="float32", batch_size=4096)
    small = dataclasses.replace(cpu, memory=1 << 30)
    with pytest.raises(ValueError, match=r"^batch_size=4096 must fit .* memory; try --config\.batch_size=1$"):
        run_ladder(config, tmp_path / "out", small)


@pytest.mark.slow
def test_a_ladder_from_start_to_answer(tmp_path, monkeypatch, cpu):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "ladder"
    flags = [*RECIPE, *SHORT, f"--out={out}", "--minutes=1.5", "--share=0.5"]
    # Planned as on a slow machine of known speed, with shorter rungs than a user gets, on an engine that fails.
    settings = {"precision": "float32", "batch_size": 2, "model.seq_len": 64, "windows": "stream"}
    monkeypatch.setattr(ladder_module, "measure_cost", lambda *_: StepCost(0.4, 1.0))
    monkeypatch.setattr(ladder_module, "MIN_STEPS", 10)
    config = build_config(**settings, **{"model.mask_documents": False})
    with pytest.raises(ValueError, match=r"^rung \d+x\d+-\d+ failed \(signal 9: it said nothing\); see .* to go on$"):
        run_ladder(config, out, cpu, minutes=1.5, share=0.5, engine=KillingEngine())
    process = start_script("ladder", *flags, "--json")
    deadline = time.monotonic() + 300
    while not (list(out.glob("rungs/*/rung.json")) and list(out.glob("rungs/*/metrics.jsonl"))[1:]):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    before = {path: path.read_bytes() for path in out.glob("rungs/*/rung.json")}
    plan = json.loads((out / "plan.json").read_text())
    assert 0 < len(before) < len(plan["rungs"]) == 7

    done = run_script("ladder", *flags, "--json")
    assert done.returncode == 0, done.stderr
    ladder = json.loads(done.stdout.splitlines()[-1])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert set(ladder["rungs"]) == set(plan["rungs"]) == {path.name for path in (out / "rungs").iterdir()}
    law = LossLaw(**ladder["law"])
    entropy = json.loads((out / "text" / "windows" / "valid.json").read_text())["entropy"]
    assert law.floor == pytest.approx(entropy["nats_per_byte"] / math.log(2))  # of the tales it is known
    for name, rung in ladder["rungs"].items():
        config = json.loads((out / "rungs" / name / "config.json").read_text())
        assert config["total_steps"] * 2 * 64 == rung["tokens"] and config["model"]["embed_dim"] == rung["embed_dim"]
        assert 0 < rung["bits_per_byte"] < 8
    text = json.loads((out / "text" / "windows" / "train.json").read_text())
    rung = next(iter(ladder["rungs"].values()))
    read_bytes = rung["tokens"] / text["tokens"] * text["bytes"]
    assert law.predict(rung["num_weights"], read_bytes, text["bytes"]) == pytest.approx(rung["predicted"])
    for prediction in (ladder["answer"], *ladder["answer"]["others"]):
        assert 0 < prediction["lower"] <= prediction["bits_per_byte"] <= prediction["upper"]
    assert ladder["held_out"]["name"] in plan["rungs"] and ladder["check"] is None
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "ladder.json").read_text()) == ladder

    [rung, *_] = out.glob("rungs/*/rung.json")
    whole = rung.read_bytes()
    rung.write_bytes(whole[:-4])
    damaged = run_script("ladder", *flags)
    assert damaged.returncode == 2 and damaged.stderr.endswith("remove it, and the rung is scored again\n")
    rung.unlink()
    again = run_script("ladder", *flags, "--check")  # nothing else is trained again, and people get a table
    assert again.returncode == 0 and "Rungs" in again.stdout and "In 2 min on this machine" in again.stdout
    assert again.stderr.count("note: rung") == 2 and rung.read_bytes() == whole
    check = json.loads((out / "ladder.json").read_text())["check"]
    assert check["lower"] <= check["predicted"] <= check["upper"] and 0 < check["bits_per_byte"] < 8
    assert check["tokens"] * check["num_weights"] > 3 * max(
        r["tokens"] * r["num_weights"] for r in ladder["rungs"].values()
    )
    assert f"The run of 2 min, predicted before: {check['predicted']:.3f}" in again.stdout
    other = run_script("ladder", *flags, "--share=0.2")
    assert other.returncode == 2 and "holds a ladder of other share; give another --out" in other.stderr
    known = known_law(load_manifest(out / "text", "train").corpus)  # what `--config.minutes` takes for this text
    assert known.source == "a ladder of 7 runs on this text" and dataclasses.asdict(known.law) == ladder["law"]
