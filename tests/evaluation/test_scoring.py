"""Every token is scored once, whatever stride and devices; totals agree with a plain loop; tales have a floor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data.loader import window_starts
from tale_jax.data.tales import grammar as tales
from tale_jax.data.token_files import load_tokens
from tale_jax.evaluation.scoring import Evaluation, Scorer, Span, document_spans, first_document_spans, stream_spans
from tale_jax.runs.experiment import open_experiment
from tale_jax.training.step import make_trainer


@given(num_tokens=st.integers(2, 300), context=st.integers(1, 50), data=st.data())
def test_spans_predict_every_token_once_with_the_context_promised(num_tokens, context, data):
    stride = data.draw(st.integers(1, context))
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


@given(lengths=st.lists(st.integers(2, 40), min_size=2, max_size=12), seq_len=st.integers(4, 30))
def test_first_documents_are_the_tokens_of_training_windows_before_the_next_bos(lengths, seq_len):
    """Of windows that begin with a document: each token of the split at most once, none of a document that follows."""
    bos = 1
    tokens = np.concatenate([[bos, *range(2, length + 1)] for length in lengths])
    starts = window_starts(tokens, seq_len, bos)
    seen = []
    for start, (span_start, first, last, _) in zip(
        starts, first_document_spans(tokens, starts, seq_len, bos), strict=True
    ):
        window = tokens[start : start + seq_len + 1]
        assert (span_start, first) == (start, start + 1) and first < last <= start + seq_len + 1
        assert bos not in tokens[first:last]
        assert last == start + len(window) or tokens[last] == bos
        seen += range(first, last)
    assert len(seen) == len(set(seen))
    scored = list(document_spans(np.flatnonzero(tokens == bos), len(tokens), seq_len, seq_len))
    assert {span[:3] for span in first_document_spans(tokens, starts, seq_len, bos)} <= {span[:3] for span in scored}


@pytest.fixture(scope="module")
def experiment(trained, cpu):
    return open_experiment(trained, cpu)


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


def test_the_floor_is_the_grammar_s_own(experiment):
    scorer = Scorer(experiment.model, experiment.tokenizer, 4)
    evaluation = Evaluation(experiment.workdir, "valid", scorer, experiment.tokenizer, "document")
    nats = {i: -tales.tell(i, "valid", experiment.config.seed).logprob for i in range(len(evaluation.grammar_nats))}
    assert evaluation.grammar_nats == pytest.approx(nats)


def test_a_sliding_window_scores_the_same_tokens(experiment):
    scorer = Scorer(experiment.model, experiment.tokenizer, 4)

    def make(stride):
        return Evaluation(experiment.workdir, "valid", scorer, experiment.tokenizer, "stream", stride)

    plain, sliding = (make(stride)(experiment.params) for stride in (0, 64))
    assert plain["tokens"] == sliding["tokens"] and sliding["stride"] == 64
    with pytest.raises(ValueError, match="stride=9999 must be at most the context of 208 tokens"):
        make(9999)


def test_devices_share_a_batch_that_they_do_not_divide_and_change_no_number(experiment, cpu):
    config = dataclasses.replace(experiment.config, micro_batch_size=8, batch_size=8).with_total_steps(1)
    trainer = make_trainer(config, dataclasses.replace(cpu, devices=tuple(jax.devices())), jnp.float32, 1)
    shared = Scorer(experiment.model, experiment.tokenizer, 5, trainer.place_same, 8, trainer.replicated)
    alone = Scorer(experiment.model, experiment.tokenizer, 5)
    assert (shared.batch_size, alone.batch_size) == (8, 5)
    wanted, found = (
        Evaluation(experiment.workdir, "valid", scorer, experiment.tokenizer, "document", max_windows=13)(
            jax.device_put(experiment.params, place)
        )
        for scorer, place in ((alone, cpu.devices[0]), (shared, trainer.replicated))
    )
    assert wanted.pop("split") == found.pop("split") and found == pytest.approx(wanted, rel=1e-5)


def test_padding_of_the_last_batch_counts_nothing(experiment):
    tokens, _ = load_tokens(experiment.workdir, "valid")
    spans = [Span(0, 1, 100), Span(0, 50, 100), Span(100, 101, 140)]
    scores = [Scorer(experiment.model, experiment.tokenizer, size)(experiment.params, tokens, spans) for size in (1, 2)]
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    (nats, counts, _), bos = scores[0], experiment.tokenizer.bos_id
    assert counts.tolist() == [np.sum(tokens[first:last] != bos) for _, first, last, _ in spans]
    assert nats[1] < nats[0]


def test_the_standard_error_is_of_documents_where_they_are_many_and_never_of_nothing(trained, cpu):
    """Of few documents it is wider than windows alone would have it; of one window there is none."""
    experiment = open_experiment(trained, cpu)
    scorer = Scorer(experiment.model, experiment.tokenizer, 8)
    evaluation = Evaluation(trained, "valid", scorer, experiment.tokenizer, "document")
    nats, counts, documents = scorer(experiment.params, evaluation.tokens, evaluation.spans)
    totals, lengths = np.bincount(documents, nats), np.bincount(documents, counts)
    mean = totals.sum() / lengths.sum()
    spread = np.sqrt(((totals - mean * lengths) ** 2).sum() * len(totals) / (len(totals) - 1)) / lengths.sum()
    assert evaluation._standard_error(nats, counts, documents) == pytest.approx(spread)
    few = dataclasses.replace(evaluation.manifest, documents=4)
    evaluation.manifest = few
    of_windows = tales.ratio(nats.tolist(), counts.tolist())[1]
    wide = evaluation._standard_error(nats, counts, np.zeros_like(documents))
    assert wide == pytest.approx(np.hypot(of_windows, 0.1))  # 0.2 nats between documents, of four
    assert evaluation._standard_error(nats[:1], counts[:1], documents[:1]) is None
