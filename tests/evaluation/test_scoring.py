"""Every token is scored once, whatever the stride; totals agree with a plain loop; tales know their floor."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data.tales import grammar as tales
from tale_jax.data.token_files import load_tokens
from tale_jax.evaluation.scoring import Evaluation, Scorer, document_spans, stream_spans
from tale_jax.runs.evaluate import evaluate
from tale_jax.runs.experiment import open_experiment

KEYS = (
    "split tokens words bytes nats_per_token token_perplexity word_perplexity bits_per_byte context stride step params"
)


@given(num_tokens=st.integers(2, 300), context=st.integers(1, 50), data=st.data())
def test_spans_predict_every_token_once_with_the_context_promised(num_tokens, context, data):
    stride = data.sample_token(st.integers(1, context))
    seen = []
    for start, first, last, _ in stream_spans(num_tokens, context, stride):
        assert 0 <= start < first < last <= num_tokens and last - start <= context + 1
        assert start == 0 or first - start >= context - stride + 1
        seen += range(first, last)
    assert seen == list(range(1, num_tokens))


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8), context=st.integers(4, 20))
def test_document_spans_stay_inside_documents(lengths, context):
    starts = np.cumsum([0, *lengths[:-1]])
    seen = []
    for start, first, last, number in document_spans(starts, sum(lengths), context, context // 2):
        assert starts[number] <= start and last <= starts[number] + lengths[number]
        seen += range(first, last)
    assert sorted(seen) == sorted(set(range(sum(lengths))) - set(starts.tolist()))


@pytest.fixture(scope="module")
def experiment(trained):
    return open_experiment(trained)


def test_scores_agree_with_one_token_at_a_time(experiment):
    """Total nats of a stretch of the stream against a loop that feeds each context and reads one probability."""
    tokens, _ = load_tokens(experiment.workdir, "valid")
    tokens, context, stride = np.asarray(tokens[:600], np.int32), experiment.config.model.seq_len, 100
    scorer = Scorer(experiment.model, experiment.tokenizer, 4)
    nats, counts, _ = scorer(experiment.params, tokens, stream_spans(len(tokens), context, stride))
    total = counted = 0
    logits_of = jax.jit(lambda x: experiment.model.apply({"params": experiment.params}, x, segments=segments_of(x))[0])

    def segments_of(x):
        return jnp.cumsum(x == experiment.tokenizer.bos_id, axis=-1)

    for start in range(0, len(tokens) - 1, stride):
        end = min(start + context + 1, len(tokens))
        row = np.full(context, experiment.tokenizer.pad_id, np.int32)
        row[: end - 1 - start] = tokens[start : end - 1]
        logprobs = jax.nn.log_softmax(logits_of(row[None])[0].astype(jnp.float32))
        for t in range(max(1, start + context + 1 - stride) if start else 1, end):
            if tokens[t] != experiment.tokenizer.bos_id:
                total -= float(logprobs[t - start - 1, tokens[t]])
                counted += 1
        if end == len(tokens):
            break
    assert counts.sum() == counted
    np.testing.assert_allclose(nats.sum(), total, rtol=1e-4)


def test_result_is_complete_and_consistent(experiment):
    result = evaluate(experiment, "test", num_samples=4)
    assert set(KEYS.split()) <= set(result)
    manifest = json.loads((experiment.workdir / "windows" / "test.json").read_text())
    assert (result["words"], result["bytes"]) == (manifest["words"], manifest["bytes"])
    assert result["tokens"] == manifest["tokens"] - manifest["documents"]
    total = result["nats_per_token"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"])
    assert result["word_perplexity"] == pytest.approx(math.exp(total / result["words"]))
    assert result["excess_nats_per_token"] == pytest.approx(
        result["nats_per_token"] - result["floor_nats_per_token"], rel=1e-6
    )
    for share in ("accepted_share", "consistent_share", "copied_share"):
        assert 0 <= result[share] <= 1
    last = (experiment.workdir / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["nats_per_token"] == result["nats_per_token"]


def test_the_floor_is_the_grammar_s_own(experiment):
    scorer = Scorer(experiment.model, experiment.tokenizer, 4)
    evaluation = Evaluation(experiment.workdir, "valid", scorer, experiment.tokenizer, "document")
    truth = [-tales.tell(i, "valid", experiment.config.seed).logprob for i in range(len(evaluation.truth))]
    np.testing.assert_allclose([evaluation.truth[i] for i in range(len(truth))], truth)


def test_more_context_is_not_worse_counted(experiment):
    """A sliding window scores the same tokens as the plain cut."""
    scorer = Scorer(experiment.model, experiment.tokenizer, 4)
    make = lambda stride: Evaluation(experiment.workdir, "valid", scorer, experiment.tokenizer, "stream", stride)  # noqa: E731
    plain, sliding = (make(stride)(experiment.params) for stride in (0, 64))
    assert plain["tokens"] == sliding["tokens"] and sliding["stride"] == 64
    with pytest.raises(ValueError, match="stride=9999 must be at most the context of 208 tokens"):
        make(9999)
