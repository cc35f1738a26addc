"""lm-eval's tasks on a model: its own numbers are those of `evaluate.py` and of plain log-probabilities."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import local_tasks

from tale_jax.data.token_files import iter_documents, load_tokens
from tale_jax.evaluation.lm_eval import Likelihoods, run_tasks
from tale_jax.evaluation.scoring import Scorer, stream_spans
from tale_jax.inference.sampler import Sampler
from tale_jax.runs.evaluate import describe_tasks, evaluate_tasks, keep
from tale_jax.runs.experiment import open_experiment


@pytest.fixture(scope="module")
def experiment(trained, cpu):
    return open_experiment(trained, cpu)


@pytest.fixture(scope="module")
def likelihoods(experiment):
    return Likelihoods(experiment.model, experiment.params, 4)


def plain_logprobs(experiment, ids):
    """Of each id but the first, by the model itself."""
    logits = experiment.model.apply({"params": experiment.params}, jnp.array([ids[:-1]]))[0][0]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return np.asarray(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])]), np.asarray(logprobs.argmax(-1))


def test_likelihoods_are_the_models_own(experiment, likelihoods):
    context = experiment.config.model.seq_len
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(4, 200, n).tolist(), rng.integers(4, 200, m).tolist()) for n, m in
             [(1, 1), (3, 9), (30, 2), (20, 31), (context, 3), (context + 40, 5), (2, 12)]]  # fmt: skip
    greedy = [1, *pairs[1][0]]
    for _ in range(4):
        greedy.append(int(plain_logprobs(experiment, [*greedy, 5])[1][-1]))
    pairs.append((greedy[:-4], greedy[-4:]))
    found = likelihoods(pairs)
    for (before, after), (nats, likeliest) in zip(pairs, found, strict=True):
        ids = [*before, *after][-context - 1 :]
        logprobs, best = plain_logprobs(experiment, ids)
        assert nats == pytest.approx(float(logprobs[-len(after) :].sum()), abs=1e-3)
        assert likeliest == (best[-len(after) :] == ids[-len(after) :]).all()
    assert found[-1][1] and not found[-2][1]


def test_a_whole_text_is_scored_as_evaluate_scores_a_document(experiment, likelihoods):
    tokens, _ = load_tokens(experiment.workdir, "valid")
    tokenizer, context = experiment.tokenizer, experiment.config.model.seq_len
    scorer = Scorer(experiment.model, tokenizer, 4)
    stream = tokens[: 3 * context + 7]
    spans = list(stream_spans(len(stream), context, context))
    stream = np.where(stream == 1, 5, stream)  # BOS would not count
    nats, counts, _ = scorer(experiment.params, stream, spans)
    assert counts.sum() == len(stream) - 1
    found = likelihoods.of_text(stream[1:].tolist(), int(stream[0]))
    assert found == pytest.approx(-nats.sum(), rel=1e-5)


def test_tasks_of_lm_eval_agree_with_our_own_numbers(experiment, likelihoods, tmp_path):
    pytest.importorskip("lm_eval")
    tokens, _ = load_tokens(experiment.workdir, "valid")
    texts = list(iter_documents(tokens, experiment.tokenizer))[:12]
    cut = [(text[: len(text) // 2], text[len(text) // 2 :][:40]) for text in texts]
    choices = [{"opening": a, "right": b, "wrong": c} for (a, b), (_, c) in itertools.pairwise(cut)]
    choices.append({"opening": "Once", "right": " upon", "wrong": " upon"})  # a tie is no knowledge
    folder = local_tasks(tmp_path / "tasks", texts, choices)
    result = evaluate_tasks(experiment, str(folder))
    measures = result["tasks"]["fox_texts"]
    bos = experiment.tokenizer.bos_id
    nats = -sum(likelihoods.of_text(experiment.tokenizer.encode(text).tolist(), bos) for text in texts)
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    assert measures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert measures["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert measures["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)

    def nats_of(choice, name):
        encode = experiment.tokenizer.encode
        before, whole = encode(choice["opening"]).tolist(), encode(choice["opening"] + " " + choice[name]).tolist()
        return likelihoods([([bos, *before], whole[len(before) :])])[0][0]

    right = sum(nats_of(choice, "right") > nats_of(choice, "wrong") for choice in choices)
    found = result["tasks"]["fox_choices"]
    assert found["acc"] == pytest.approx(right / len(choices)) and found["ties"] == 1
    assert "fox_choices (12 documents)" in describe_tasks(result) and "bits_per_byte" in describe_tasks(result)
    assert keep(experiment.workdir, result)
    kept = (experiment.workdir / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(kept)["tasks"] == result["tasks"]


def test_tasks_that_cannot_be_run(experiment, likelihoods, tmp_path):
    pytest.importorskip("lm_eval")
    sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
    (tmp_path / "empty").mkdir()
    for tasks, reason in {
        "helaswag": r"--tasks=helaswag must be a task of lm-eval or a folder of tasks; did you mean hellaswag\?",
        "zzzzqqqq": r"must be a task of lm-eval or a folder of tasks; see https://github.com/EleutherAI",
        str(tmp_path / "empty"): r"--tasks=.*empty must be a folder that holds tasks as .yaml files; give another",
        ",": r"--tasks= must name tasks; try --tasks=lambada_openai",
    }.items():
        with pytest.raises(ValueError, match=reason):
            run_tasks(sampler, likelihoods, tasks)
    folder = local_tasks(tmp_path / "tasks", ["x"], [{}])
    (folder / "texts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"--tasks=.*fox_texts cannot be run \(\w+: .*\); check the task's data"):
        run_tasks(sampler, likelihoods, str(folder))


def test_without_the_library_the_extra_is_named(experiment, likelihoods, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
    with pytest.raises(ValueError, match=r"--tasks needs lm-eval .*, which is not installed; .*eval"):
        run_tasks(sampler, likelihoods, "hellaswag")
