"""Each measure refuses the writer it was made for, and real held-out text passes them all."""

import json
import random
import shutil

import numpy as np
import pytest
from helpers import run_script

from tale_jax.data.tales import grammar as tales
from tale_jax.data.token_files import iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation import quality_samples as writing
from tale_jax.evaluation.ngram import NgramModel
from tale_jax.evaluation.quality_samples import held_out_pieces
from tale_jax.evaluation.text_quality import (
    LIMITS,
    as_record,
    common_grams,
    compare,
    distinct_share,
    first_words,
    found_share,
    repeated_share,
    searched,
)
from tale_jax.inference.sampler import TextDelta

COUNT = 60


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="module")
def training():
    return [tales.tell(i, "train", 0).text for i in range(400)]


@pytest.fixture(scope="module")
def judge(tokenizer, training):
    marked = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in training]
    return NgramModel(np.concatenate(marked), tokenizer.vocab_size)


def halves(text):
    """The first 20 words, and what follows."""
    start = first_words(text, 20)
    return TextDelta(start, text[len(start) :])


@pytest.fixture(scope="module")
def held_out():
    return [halves(tales.tell(i, "valid", 0).text) for i in range(2 * COUNT)]


@pytest.fixture(scope="module")
def check(held_out, judge, tokenizer, training):
    """Names of the measures that refuse texts put in the place of the continuations, and all measures."""

    def checked(texts):
        samples = [TextDelta(piece.prompt, text) for piece, text in zip(held_out[:COUNT], texts, strict=True)]
        trained = common_grams(searched([*samples, *held_out]), training)
        measures = compare(samples, held_out[COUNT:], judge, tokenizer.encode, trained)
        assert list(measures) == list(LIMITS)
        return {name for name, one in measures.items() if not one.passes}, measures

    return checked


def shuffled(text, seed):
    words = text.split()
    random.Random(seed).shuffle(words)
    return " " + " ".join(words)


def looped(text):
    return (" " + " ".join(text.split()[:6])) * 20


def test_held_out_text_passes(check, held_out):
    refused, measures = check([piece.text for piece in held_out[:COUNT]])
    assert not refused
    assert all(one.verdict == "as held-out text" for one in measures.values())
    assert all(one.ratio is None or 0.5 < one.ratio < 2 for name, one in measures.items() if name != "repetition")


def test_what_is_beyond_the_shorter_text_counts_for_length_alone(check, held_out):
    refused, measures = check([piece.text + " zap" * 400 for piece in held_out[COUNT:]])
    assert refused == {"length"} and measures["length"].verdict == "too high: does not end"
    for name in ("repetition", "distinct_1", "distinct_2", "distinct_3", "new_words", "copying"):
        assert measures[name].samples == measures[name].held_out
    assert measures["judge"].ratio == pytest.approx(1, abs=0.05)  # after prompts of others


def test_a_loop_is_refused(check, held_out):
    refused, measures = check([looped(piece.text) for piece in held_out[:COUNT]])
    assert {"repetition", "distinct_2", "distinct_3"} <= refused
    assert measures["repetition"].verdict == "too high: repeats itself"
    assert measures["repetition"].samples > 0.8


def test_one_word_again_and_again_is_refused(check):
    refused, measures = check([" the" * 120] * COUNT)
    assert {"repetition", "distinct_1", "distinct_2", "distinct_3"} <= refused
    assert measures["distinct_1"].verdict == "too low: few words"


def test_shuffled_words_are_refused_by_the_judge(check, held_out):
    refused, measures = check([shuffled(piece.text, i) for i, piece in enumerate(held_out[:COUNT])])
    assert {"judge"} <= refused
    assert measures["judge"].verdict.startswith("too high")
    assert not {"length", "repetition", "distinct_1", "new_words"} & refused  # these do not see the order


def test_copies_of_the_training_text_are_refused(check, training):
    """Though much of any tale stands in the training text, and only the judge and this measure can see it."""
    refused, measures = check([halves(text).text for text in training[:COUNT]])
    assert "copying" in refused
    assert measures["copying"].samples == 1
    assert not {"length", "repetition", "distinct_1", "distinct_2", "distinct_3"} & refused


def test_made_up_words_are_refused(check, held_out):
    refused, _ = check([piece.text.replace("e", "ozu") for piece in held_out[:COUNT]])
    assert {"new_words", "judge"} <= refused


@pytest.mark.parametrize("text", ["", " The end."], ids=["nothing", "two words"])
def test_a_model_that_stops_at_once_is_refused(check, text):
    refused, measures = check([text] * COUNT)
    assert "length" in refused
    assert measures["length"].verdict == "too low: ends too early"
    records = {name: as_record(one, one) for name, one in measures.items()}
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert measures["judge"].passes == (measures["judge"].verdict == "as held-out text")
    if not text:
        assert "judge" in refused and records["judge"]["samples"] is None
        assert table({"measures": records})[1][0][1] == "0.0"


def test_what_is_too_easy_for_the_judge_is_refused_too():
    """Text of words at random, which nobody can foretell, but for one who knows the training text by heart."""
    draw = np.random.default_rng(0)
    write = lambda: TextDelta("", " ".join(str(number) for number in draw.integers(0, 200, 100)))  # noqa: E731
    encode = lambda text: np.array([int(word) for word in text.split()], np.int64)  # noqa: E731
    read, held_out, honest = ([write() for _ in range(20)] for _ in range(3))
    judge = NgramModel(np.concatenate([encode(piece.text) for piece in read]), 200)
    fair, copied = (compare(samples, held_out, judge, encode, set())["judge"] for samples in (honest, read))
    assert fair.passes and fair.held_out == pytest.approx(200, rel=0.3)
    assert copied.verdict == "too low: loops, set phrases or copies" and copied.ratio < 0.1


def test_measures_count_what_they_say():
    assert repeated_share(["a b c d a b c d".split()], 4) == pytest.approx(1 / 5)
    assert repeated_share(["a b c d".split(), "a b c d".split()], 4) == 0  # within a text only
    assert distinct_share(["a b a".split(), "a b".split()], 1) == pytest.approx(2 / 5)
    assert distinct_share(["a b a".split(), "a b".split()], 2) == pytest.approx(2 / 3)  # none over the border
    wanted = {("a", "b"), ("b", "c"), ("d",), ("z",)}
    assert common_grams(wanted, ["x a b", "c d"]) == {("a", "b"), ("d",)}
    assert found_share(["a b c".split()], {("a", "b")}, 2) == 0.5
    assert repeated_share([[]]) == distinct_share([], 2) == found_share([["a"]], set()) == 0
    assert (
        first_words(" a  b\nc d", 3) == " a  b\nc" and first_words(" a b \n", 9) == " a b" and not first_words("a", 0)
    )


def test_bounds_leave_room_for_shares_of_nothing_and_of_all():
    for limits in LIMITS.values():
        for held_out in (0.0, 0.01, 0.5, 0.9):
            least, most = limits.bounds(held_out)
            assert least <= held_out <= most
            if limits.share:
                assert most <= 1
            if limits.halfway:
                assert held_out < most < 1


def test_pieces_are_text_of_the_split_in_whole_words(trained, tokenizer):
    tokens, _ = load_tokens(trained, "valid")
    documents = list(iter_documents(tokens, tokenizer))
    for opening, length in ((32, 160), (10, 20)):
        pieces = held_out_pieces(tokens, tokenizer, opening, length, 30)
        assert len(pieces) == 30 == len(set(pieces))
        for prompt, text in pieces:
            document = next(d for d in documents if prompt + text in d)
            at = document.index(prompt + text)
            assert at == 0 or (text.startswith((" ", "\n")) and prompt.startswith((" ", "\n")))
            assert len(tokenizer.encode(prompt)) < opening + 8


def test_the_published_prompts_are_different_and_fit():
    assert len(set(writing.PROMPTS)) == len(writing.PROMPTS) == writing.NUM_SAMPLES // 4
    assert all(prompt == prompt.strip() for prompt in writing.PROMPTS)


def test_the_script_adds_quality_and_keeps_every_sample(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    results = []
    for flags in ([], ["--quality"]):
        done = run_script("evaluate", f"--workdir={workdir}", "--json", "--num_samples=2", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    plain, result = results
    found = result.pop("quality")
    assert result.keys() == plain.keys() and result["nats_per_token"] == plain["nats_per_token"]
    assert [one["temperature"] for one in found] == list(writing.TEMPERATURES)
    for one in found:
        assert list(one["measures"]) == list(LIMITS)
        assert one["passes"] == all(measure["passes"] for measure in one["measures"].values())
        for measure in one["measures"].values():
            assert {"samples", "held_out", "least", "most", "ratio", "passes", "verdict", "other_ratio"} == set(measure)
    records = [json.loads(line) for line in (workdir / "quality.jsonl").read_text().splitlines()]
    assert len(records) == sum(one["num_samples"] for one in found)
    assert {"prompt", "text", "seed", "number", "temperature", "step", "split"} <= set(records[0])
    assert {record["prompt"] for record in records} >= set(writing.PROMPTS[:2])
    kept = json.loads((workdir / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept["quality"] == found
