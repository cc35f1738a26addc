"""A report is one file that stands alone, whatever state the run is in."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers import ROOT

from tale_jax.runs.report import SERVER, write_report

VOID = {"meta", "br", "hr", "img", "link"}


class Checker(HTMLParser):
    """Every tag is closed in order; nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                is_server = tag == "a" and value == SERVER  # a link loads nothing
                assert str(value).startswith("#") or is_server, value
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check(path) -> Checker:
    checker = Checker()
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", page)
    checker.feed(page)
    assert not checker.open
    return checker


def make_run(workdir, steps=40, loss=lambda step: 1.2 + 3 / step, floor=1.1, rate=1e-3):
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "optimizer": {"learning_rate": rate}}))
    records = [
        {"kind": "run", "step": 0, "time": 1000.0, "device": "cpu", "precision": "float32", "params": 1_234_567,
         "tokens_per_step": 100, "total_steps": 40, "floor_nats_per_token": floor, "floor_nats_per_token_stderr": 0.01}
    ]  # fmt: skip
    for step in range(1, steps + 1):
        records.append(
            {"kind": "train", "step": step, "loss": loss(step), "grad_norm": 1.0, "learning_rate": rate,
             "tokens": 100 * step, "tokens_per_second": 5000.0, "peak_share": 0.4, "data_wait": 0.01,
             "time": 1000.0 + step}
        )  # fmt: skip
        if step % 10 == 0:
            records.append({"kind": "valid", "step": step, "nats_per_token": loss(step), "bits_per_byte": 0.5,
                            "excess_nats_per_token": 0.1 + 1 / step})  # fmt: skip
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = [
        {"step": step, "prompt": "Once", "text": f"Once <script>alert({step})</script> & more \x00\ud800", "seed": 0}
        for step in range(10, steps + 1, 10)
    ]
    (workdir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    evaluation = {"split": "valid", "step": steps, "tokens": 999, "nats_per_token": 1.3, "accepted_share": 0.9}
    (workdir / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n" + json.dumps(evaluation)[:20])
    return workdir


def test_one_run(tmp_path):
    path = write_report([make_run(tmp_path / "tales")])
    assert path == (tmp_path / "tales" / "report.html").resolve()
    checker = check(path)
    text = " ".join(checker.texts)
    assert checker.tags.count("svg") == 5
    for words in ("entropy floor 1.100 ± 0.010", "1.275 nats/token", "1.23M", "step 40", "accepted share", "0:40",
                  "learning_rate", "<script>alert(40)</script> & more"):  # fmt: skip
        assert words in text, words
    assert "not finite" not in text
    assert not list(path.parent.glob("*.partial"))


def test_the_summary_says_where_validation_was_best_before_the_end(tmp_path):
    text = " ".join(check(write_report([make_run(tmp_path / "fine")])).texts)
    assert "Lowest validation loss" not in text
    overfitted = make_run(tmp_path / "overfitted", loss=lambda step: 1 + abs(step - 20) / 10)
    text = " ".join(check(write_report([overfitted])).texts)
    assert "1.000 nats/token at step 20: its checkpoint is used" in text and "3.000" in text


def test_the_summary_says_how_much_was_scored_how_sure_it_is_and_what_the_time_went_into(tmp_path):
    workdir = make_run(tmp_path / "tales")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records[0] |= {"startup_seconds": 30.0, "was_prepared": False}
    part = {"windows": 64, "split_windows": 1500, "nats_per_token_stderr": 0.05}
    records = [record | (part if record["kind"] == "valid" else {}) for record in records]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = " ".join(check(write_report([workdir])).texts)
    assert "1.275 ± 0.098 nats/token on 64 of 1,500 windows" in text  # twice: of the loss, and of the excess
    assert "0.1250 nats/token on 64 of 1,500 windows" in text
    assert "1:10" in text and "0:30 for planning and compiling and preparing the text" in text
    records[0]["was_prepared"] = True
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "compiling; the text was prepared before" in " ".join(check(write_report([workdir])).texts)


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for workdir in runs:
        (workdir / "windows").mkdir()
        manifest = {"tokenizer": workdir.name, "tokens": 10, "bytes": 20, "words": 5, "documents": 1}
        (workdir / "windows" / "valid.json").write_text(json.dumps(manifest))
    text = " ".join(check(write_report(runs)).texts)
    assert "losses are drawn in bits per byte" in text and text.index("Bits per byte") < text.index("Validation loss")


def test_samples_beside_held_out_text(tmp_path):
    """The last evaluation that has them is shown, a table for each temperature."""
    workdir = make_run(tmp_path / "tales")
    measure = {"samples": 0.5, "held_out": 0.0, "lower": 0.0, "upper": 0.02, "ratio": None, "control_ratio": 1.25,
               "in_range": False, "verdict": "too high: <repeats>"}  # fmt: skip
    quality = [
        {"temperature": t, "num_samples": 64, "words": 6345, "in_range": False, "measures": {"repetition": measure}}
        for t in (0.8, 1.0)
    ]
    with (workdir / "evaluations.jsonl").open("a") as file:
        for record in ({"step": 30, "quality": quality[:1]}, {"step": 40, "quality": quality}, {"step": 41}):
            file.write("\n" + json.dumps({"split": "valid", **record}))
    checker = check(write_report([workdir]))
    text = " ".join(checker.texts)
    for words in ("step 40, temperature 0.8, 6,345 words", "Not tested: sense.",
                  "temperature 1, 6,345", "too high: <repeats>", "0.500",
                  "1.25", "0.000 to 0.020", "4-grams that the text had before"):  # fmt: skip
        assert words in text, words
    assert "step 30, temperature" not in text
    other = make_run(tmp_path / "other")
    assert text.count("repeats") == 2 and "too high: <repeats>" in " ".join(check(write_report([workdir, other])).texts)
    assert "beside held-out" not in " ".join(check(write_report([other])).texts)


def test_why_training_lies_above_validation_is_said_where_it_does(tmp_path):
    workdir = make_run(tmp_path / "tales")
    plain = check(write_report([workdir]))
    assert "first document" not in " ".join(plain.texts)
    metrics = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in metrics]
    for record in records:
        if record["kind"] == "valid":
            record["train_nats_per_token"] = record["nats_per_token"] - 0.01
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = " ".join(check(write_report([workdir])).texts)
    assert "training, first document of a window" in text  # in the legend
    assert "The training loss counts these openings; validation has none" in text
    other = make_run(tmp_path / "other")
    assert "first document" not in " ".join(check(write_report([workdir, other])).texts)


def test_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / name, rate=rate) for name, rate in (("a", 1e-3), ("b", 5e-4), ("c", 1e-3))]
    path = write_report([*runs, runs[0]])
    assert path == (tmp_path / "comparison.html").resolve()
    text = " ".join(check(path).texts)
    assert "Settings that differ" in text
    assert "optimizer.learning_rate" in text
    assert "0.0005" in text
    assert "a, b, c" in text


def test_a_setting_that_an_older_config_lacks_does_not_differ_from_its_default(tmp_path):
    runs = [make_run(tmp_path / name, rate=rate) for name, rate in (("old", 1e-3), ("new", 5e-4))]
    settings = {"seed": 0, "minutes": 0.0, "optimizer": {"learning_rate": 5e-4, "normuon_beta": 0.0, "momentum": 0.9}}
    (runs[1] / "config.json").write_text(json.dumps(settings))
    text = " ".join(check(write_report(runs)).texts)
    summary = text[text.index("Settings that differ") : text.index("Loss", text.index("Settings that differ"))]
    assert "optimizer.learning_rate" in summary and "optimizer.momentum" in summary
    assert "normuon_beta" not in summary and "minutes" not in summary


def test_runs_of_one_name_are_told_apart(tmp_path):
    out = tmp_path / "new" / "o.html"
    path = write_report([make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")], out)
    assert path == out
    assert "x/run, y/run" in " ".join(check(path).texts)


def test_a_run_of_one_step(tmp_path):
    check(write_report([make_run(tmp_path / "tales", steps=1)]))


def test_a_run_without_a_step(tmp_path):
    assert "No step has been recorded yet" in " ".join(check(write_report([make_run(tmp_path / "t", steps=0)])).texts)


@pytest.mark.parametrize("first", [1, 25], ids=["all", "from step 25"])
def test_a_run_that_diverged(tmp_path, first):
    workdir = make_run(tmp_path / "tales", loss=lambda step: None if step >= first else 2.0, floor=0)
    text = " ".join(check(write_report([workdir])).texts)
    assert f"first at step {first}" in text
    assert "not finite" in text
    assert "nan" not in text


def test_only_metrics_are_needed(tmp_path):
    workdir = make_run(tmp_path / "tales")
    for name in ("config.json", "samples.jsonl", "evaluations.jsonl"):
        (workdir / name).unlink()
    check(write_report([workdir]))


def test_samples_of_steps_repeated_after_a_crash(tmp_path):
    workdir = make_run(tmp_path / "tales")
    samples = [{"step": step, "prompt": "", "text": text} for step, text in ((10, "ten"), (20, "lost"), (10, "again"))]
    (workdir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = " ".join(check(write_report([workdir])).texts)
    assert "again" in text
    assert "ten" in text
    assert "lost" not in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda workdir: None, "does not exist"),
        (lambda workdir: workdir.mkdir(), "holds no records in metrics.jsonl"),
        (lambda workdir: (make_run(workdir) / "config.json").write_text("{"), "config.json is not JSON"),
    ],
)
def test_nothing_to_report_is_one_line(tmp_path, make, message):
    make(tmp_path / "tales")
    with pytest.raises(ValueError, match=message) as raised:
        write_report([tmp_path / "tales"])
    assert "\n" not in str(raised.value)


def test_the_script(tmp_path):
    workdir = make_run(tmp_path / "tales")
    script = [sys.executable, "launch/report.py"]
    done = subprocess.run([*script, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(workdir / "report.html") in done.stdout
    done = subprocess.run([*script, f"--workdir={tmp_path / 'no'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "does not exist" in done.stderr
