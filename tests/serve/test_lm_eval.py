"""lm-eval over HTTP, with no tokenizer but the server's: its scores are those of the model, to the last digits."""

import itertools
import json
import math

import numpy as np
import pytest
from helpers import local_tasks, served

from tale_jax.data.tales import grammar
from tale_jax.evaluation.scoring import Scorer, Span
from tale_jax.runs.evaluate import evaluate_tasks
from tale_jax.runs.experiment import open_experiment

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
pytest.importorskip("tenacity", reason="needs lm-eval[api]")
pytestmark = pytest.mark.slow
TALES = ["Once there was a fox named Ada.", "Once there was a boy who had a hat.\nHe went to the mill."]
CHOICES = [("Once there was", [" a fox", " fox a", " the the"]), ("The fox had", [" a hat", " hat hat a"])]


def nats_of(model, ids, begin):
    """Nats of the ids from `begin` on, after those before, by the scorer of `evaluate.py`."""
    ids = [model.tokenizer.bos_id, *ids]
    params = model.params(model.default)
    return Scorer(model.model, model.tokenizer, 1)(
        params, np.asarray(ids, np.int32), [Span(0, begin + 1, len(ids), 0)]
    )[0][0]


def asked_with(model, url):
    """What lm-eval's local-completions is told, as launch/README.md has it."""
    return {
        "base_url": f"{url}/v1/completions",
        "model": "chatty",
        "tokenizer_backend": "remote",
        "custom_prefix_token_id": model.tokenizer.bos_id,
        "max_length": model.context,
        "batch_size": 2,
    }


def test_scores_of_lm_eval(chat_workdir, model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with served(f"--workdir={chat_workdir}", "--rows=8") as (_, url):
        lm = LocalCompletionsAPI(**asked_with(model, url))
        pairs = [(context, choice) for context, choices in CHOICES for choice in choices]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found = lm.loglikelihood(asked)
        for (context, choice), (logprob, _) in zip(pairs, found, strict=True):
            ids, begin = model.tokenizer.encode(context + choice).tolist(), len(model.tokenizer.encode(context))
            assert logprob == pytest.approx(-nats_of(model, ids, begin), abs=1e-4), json.dumps([context, choice])
        asked = [Instance("loglikelihood_rolling", {}, (tale,), i) for i, tale in enumerate(TALES)]
        for tale, logprob in zip(TALES, lm.loglikelihood_rolling(asked), strict=True):
            assert math.isfinite(logprob)
            assert logprob == pytest.approx(-nats_of(model, model.tokenizer.encode(tale).tolist(), 0), abs=1e-4)
        more = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
        [text] = lm.generate_until([Instance("generate_until", {}, ("Once there was", more), 0)])
        assert text


def test_tasks_over_http_score_as_evaluate_py_does(chat_workdir, model, cpu, tmp_path):
    """The two local tasks, by `evaluate.py --tasks` and by lm-eval that knows the server's address alone."""
    from lm_eval.tasks import TaskManager

    texts = [grammar.tell(index, "valid").text[:200] for index in range(8)]
    cut = [(text[:80], text[80:130].strip()) for text in texts]
    choices = [{"opening": a, "right": b, "wrong": c} for (a, b), (_, c) in itertools.pairwise(cut)]
    folder = local_tasks(tmp_path / "tasks", texts, choices)
    ours = evaluate_tasks(open_experiment(chat_workdir, cpu), str(folder))["tasks"]
    with served(f"--workdir={chat_workdir}", "--rows=8", "--precision=float32") as (_, url):
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=asked_with(model, url),
            tasks=["fox_choices", "fox_texts"],
            task_manager=TaskManager(include_path=str(folder)),
            bootstrap_iters=0,
        )
    theirs = {task: {name.split(",")[0]: x for name, x in all_.items()} for task, all_ in found["results"].items()}
    assert theirs["fox_choices"]["acc"] == ours["fox_choices"]["acc"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert theirs["fox_texts"][name] == pytest.approx(ours["fox_texts"][name], rel=1e-4), name
