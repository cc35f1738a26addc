"""Rows join and leave a batch, and none of them notices: to the bit."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.inference.sampler import SampleSettings
from tale_jax.serve.engine import CHUNK, Delta, Engine, Failure, Job, Prompt, QueueFull
from tale_jax.serve.models import Variant


class Listener:
    """What a job told."""

    def __init__(self):
        self.events, self.done = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Failure) or (isinstance(event, Delta) and event.finish_reason):
            self.done.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def scores(self):
        return [score for event in self.events if isinstance(event, Delta) for score in event.tokens]


def job(ids, max_tokens=20, **more):
    settings = {name: more.pop(name) for name in list(more) if name in SampleSettings.__dataclass_fields__}
    listener = Listener()
    limits = SampleSettings(max_tokens=max(1, max_tokens), **settings)
    return Job(ids=ids, limits=limits, on_event=listener, max_tokens=max_tokens, **more), listener


def write(engine, *jobs):
    engine.submit([job for job, _ in jobs])
    for _, listener in jobs:
        assert listener.done.wait(60)
    return [listener for _, listener in jobs]


def encode(model, text):
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text).tolist()]


@pytest.fixture
def engine(model):
    assert model.engine.idle
    return model.engine


def test_a_row_does_not_notice_the_others_to_the_bit(model, engine):
    """Alone, and while others with all kinds of settings come and go, some of them cancelled, and in another row."""
    ids = encode(model, "Once there was")
    wanted = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 7, "top": 3}
    [alone] = write(engine, job(ids, **wanted))
    others = [
        job(encode(model, text), seed=seed, **settings)
        for seed, (text, settings) in enumerate(
            [
                ("The fox", {"max_tokens": 3}),
                ("", {"max_tokens": 50, "temperature": 0.0, "repetition_penalty": 1.3}),
                ("A long walk and then some more of it", {"top_k": 5, "top": 20, "max_tokens": 9}),
                ("x", {"min_p": 0.2, "presence_penalty": 1.0, "logit_bias": {300: 5.0}, "max_tokens": 33}),
                ("y", {"weights": Variant(10), "max_tokens": 12}),
                ("z", {"score_prompt": True, "top": 2, "max_tokens": 5}),
            ]
            * 3
        )
    ]
    beside = [job(ids, **wanted) for _ in range(3)]
    for index, one in enumerate([*others, *beside]):
        engine.submit([one[0]])
        if index % 5 == 4:
            engine.cancel([others[index // 2][0]])
            time.sleep(0.02)
    for _, listener in beside:
        assert listener.done.wait(60)
        assert listener.scores == alone.scores  # log-probabilities too: equal floats
        assert listener.text == alone.text


def test_the_text_is_that_of_the_sampler(model, engine):
    settings = {"temperature": 0.8, "top_k": 50, "repetition_penalty": 1.1}
    expected = model.sampler.sample(
        "Once", SampleSettings(max_tokens=60, **settings), num_samples=2, seed=5, params=model.params(model.default)
    )
    ids = encode(model, "Once")
    told = write(engine, *(job(ids, 60, seed=5, number=number, **settings) for number in range(2)))
    assert [listener.text for listener in told] == [sample.text for sample in expected]
    for listener, sample in zip(told, expected, strict=True):
        reason = listener.events[-1].finish_reason
        assert reason == sample.finish_reason and listener.events[-1].num_tokens == sample.tokens


def test_scores_are_the_sampler_s_and_after_is_what_was_sampled_from(model, engine):
    [told] = write(engine, job(encode(model, "The"), 30, temperature=0.5, top_k=4, top=20, seed=1))
    for score in told.scores:
        kept = [np.exp(after) for _, _, after in score.top if after > -np.inf]
        assert len(kept) == 4 and sum(kept) == pytest.approx(1, abs=1e-5)
        assert score.after is not None and score.after > -np.inf
        assert [before for _, before, _ in score.top] == sorted((b for _, b, _ in score.top), reverse=True)
        by_id = {token: (before, after) for token, before, after in score.top}
        if score.id in by_id:
            assert by_id[score.id] == (pytest.approx(score.before, abs=1e-6), pytest.approx(score.after, abs=1e-6))
    [greedy] = write(engine, job(encode(model, "The"), 5, temperature=0.0, top=20))
    assert all(score.after == 0 and score.id == score.top[0][0] for score in greedy.scores)


def test_bias_and_penalties(model, engine):
    ids = encode(model, "Once")
    [told] = write(engine, job(ids, 12, temperature=0.0, logit_bias={400: 100.0}, top=1))
    assert {score.id for score in told.scores} == {400}
    settings = {"temperature": 0.0, "logit_bias": {400: 99.0, 401: 99.0}, "top": 1}
    [plain, once, often] = write(
        engine,
        job(ids, 40, **settings),
        job(ids, 40, presence_penalty=2.0, **settings),
        job(ids, 40, frequency_penalty=2.0, **settings),
    )
    assert {score.id for score in often.scores} == {400, 401}
    counts = [[score.id for score in told.scores].count(400) for told in (plain, once, often)]
    assert abs(counts[2] - 20) <= min(abs(counts[0] - 20), abs(counts[1] - 20)) and counts[0] != counts[2]


def test_a_text_outgrows_the_context(model, engine):
    [told] = write(engine, job(encode(model, "Once"), 2 * model.context, logit_bias={model.tokenizer.eos_id: -100.0}))
    assert told.events[-1].num_tokens == 2 * model.context and told.events[-1].finish_reason == "length"


def test_a_prompt_may_fill_the_context_and_is_scored(model, engine):
    ids = np.random.default_rng(0).integers(4, 500, model.context).tolist()
    ids[0] = model.tokenizer.bos_id
    [told] = write(engine, job(ids, 0, score_prompt=True, top=2))
    assert isinstance(told.events[0], Prompt) and told.events[1].finish_reason == "length"
    logits, _ = model.model.apply({"params": model.params(model.default)}, jnp.asarray([ids], jnp.int32))
    logits = np.asarray(logits[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert [score.id for score in told.events[0].tokens] == ids[1:]
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([score.before for score in told.events[0].tokens], expected, atol=1e-4)


def test_the_queue_has_a_bound_and_cancelling_empties_it(model, engine):
    jobs = [job(encode(model, "Once"), 400, logit_bias={model.tokenizer.eos_id: -100.0}) for _ in range(64)]
    engine.submit([one for one, _ in jobs[:8]])
    while engine.running < 8:
        time.sleep(0.01)
    engine.submit([one for one, _ in jobs[8:]])
    more = [job(encode(model, "x")) for _ in range(9)]
    with pytest.raises(QueueFull):
        engine.submit([one for one, _ in more])
    assert engine.waiting == 56
    engine.cancel([one for one, _ in jobs])
    assert engine.waiting == 0
    end = time.monotonic() + 60
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.idle
    assert not any(listener.done.is_set() for _, listener in jobs)
    assert write(engine, job(encode(model, "Once"), 4))[0].done.is_set()


def test_weights_that_are_no_numbers_end_their_own_texts_only(model, engine, monkeypatch):
    def broken(key):
        good = model._both(key or model.default)[1]
        return good if key != "broken" else {**good, "head": good["head"] * np.nan}

    monkeypatch.setattr(engine, "weights_of", broken)
    bad, fine = write(engine, job(encode(model, "x"), weights="broken"), job(encode(model, "x")))
    assert isinstance(bad.events[-1], Failure) and isinstance(fine.events[-1], Delta)


def test_an_engine_survives_what_goes_wrong_in_it(model, engine, monkeypatch):
    real = engine.weights_of

    def fails(key):
        if key == "missing":
            raise RuntimeError("gone")
        return real(key)

    monkeypatch.setattr(engine, "weights_of", fails)
    bad, fine = write(engine, job(encode(model, "x"), weights="missing"), job(encode(model, "x")))
    assert isinstance(bad.events[-1], Failure) and fine.text
    monkeypatch.setattr(engine.sampler, "decode_with_top", None)
    [bad] = write(engine, job(encode(model, "x")))
    assert isinstance(bad.events[-1], Failure)
    monkeypatch.undo()
    assert write(engine, job(encode(model, "x")))[0].text


def test_nothing_compiles_after_the_start(model, engine):
    sizes = engine.sampler.decode_with_top._cache_size(), engine._insert._cache_size()
    for length in (1, 20, 100, 200):
        write(engine, job([1] + [5] * length, 3, top=4, seed=length), job([1] + [7] * length, CHUNK + 1))
    assert (engine.sampler.decode_with_top._cache_size(), engine._insert._cache_size()) == sizes


def test_stop_ends_what_is_left(model):
    engine = Engine(model.sampler, model.engine.weights_of, rows=4, block_rows=4)
    engine.start()
    jobs = [job(encode(model, "Once"), 4000, logit_bias={model.tokenizer.eos_id: -100.0}) for _ in range(6)]
    engine.submit([one for one, _ in jobs])
    engine.stop()
    assert all(isinstance(listener.events[-1], Failure) for _, listener in jobs)
