"""lm-eval over HTTP, with no tokenizer but the server's: its scores are those of the model, to the last digits."""

import json
import math

import numpy as np
import pytest
from helpers import served

from tale_jax.evaluation.scoring import Scorer, Span

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


def test_scores_of_lm_eval(chat_workdir, model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with served(f"--workdir={chat_workdir}", "--rows=8") as (_, url):
        lm = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="chatty",
            tokenizer_backend="remote",
            custom_prefix_token_id=model.tokenizer.bos_id,
            max_length=model.context,
            batch_size=2,
        )
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
