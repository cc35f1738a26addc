"""Near-duplicates are found whatever their line ends, form letters are not thrown together, and shares are exact."""

import random

import numpy as np
import pytest
from helpers import ROOT, build_config
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data.corpus import SPLITS, open_corpus
from tale_jax.data.duplicates import MAX_PRINTINGS, RUN_BYTES, NearDuplicates, RunSample, run_hashes
from tale_jax.data.readers import words_only

FAULTS = ROOT.parent / "shared" / "faults"
SYLLABLES = "ba de fi go lu ma ne pi ro su ta vo".split()


def prose(rng, words):
    """Text in paragraphs, none like another."""
    text = []
    for index in range(words):
        text.append("".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(1, 5))))
        if rng.random() < 0.1:
            text[-1] += rng.choice([". ", ", ", "!\n\n", ".\n\n", ".\n\n"]) if index % 7 == 0 else "."
    return " ".join(text)


def clusters_of(texts, max_share=0.05):
    with NearDuplicates() as near:
        for text in texts:
            near.add(text)
        clusters = near.clusters(max_share)
        return clusters, near.positions(clusters)


@given(st.binary(min_size=1, max_size=300), st.integers(1, 60))
def test_equal_runs_have_equal_hashes(data, width):
    if len(data) < width:
        return
    hashes = run_hashes(data, width).tolist()
    runs = [data[start : start + width] for start in range(len(data) - width + 1)]
    assert len(hashes) == len(runs)
    by_hash = dict(zip(hashes, runs, strict=True))
    assert all(by_hash[h] == run for h, run in zip(hashes, runs, strict=True))
    assert len(set(hashes)) == len(set(runs))


CHANGES = {
    "line ends": lambda text: text.replace("\n", "\r\n"),
    "other lines": lambda text: text.replace(" ", "\n"),
    "quotes": lambda text: text.replace(".", "’").replace(",", "—"),
    "capitals": str.upper,
    "a sentence more": lambda text: "A new foreword. " + text,
    "half of it more": lambda text: text + prose(random.Random(text), len(text) // 20),
    "a typo a line": lambda text: "".join(c if i % 300 else "q" for i, c in enumerate(text)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_printings_of_a_document_belong_together(change):
    rng = random.Random(0)
    texts = [prose(rng, 400) for _ in range(40)]
    clusters, positions = clusters_of([*texts, *map(CHANGES[change], texts)])
    assert (clusters[:40] == clusters[40:]).mean() > 0.95
    assert len(np.unique(clusters[:40])) == 40
    assert all(len(set(positions[clusters == cluster])) == 1 for cluster in range(clusters.max() + 1))


def test_form_letters_do_not_all_belong_together():
    rows = [
        f"Dear customer {n}, your parcel with number {n * 7919} will arrive on day {n % 30}. Yours" for n in range(400)
    ]
    clusters, _ = clusters_of(rows)
    assert np.bincount(clusters).max() <= max(MAX_PRINTINGS, 0.05 * 400)
    twice, _ = clusters_of([*rows, *rows])
    assert (twice[:400] == twice[400:]).all()


@given(st.lists(st.text(max_size=20), max_size=12))
def test_equal_texts_belong_together_whatever_they_are(texts):
    clusters, positions = clusters_of([*texts, *texts])
    half = len(texts)
    assert (clusters[:half] == clusters[half:]).all()
    assert ((positions >= 0) & (positions < 1)).all()


def test_a_documents_own_position_is_that_of_its_hash():
    texts = [prose(random.Random(n), 50) for n in range(200)]
    alone = [clusters_of([text])[1][0] for text in texts]
    assert clusters_of(texts)[1].tolist() == alone
    reverse = clusters_of(texts[::-1])[1].tolist()
    assert reverse[::-1] == alone
    assert 0.4 < np.mean(alone) < 0.6


def test_the_position_of_a_cluster_is_as_likely_anywhere():
    rng = random.Random(1)
    pairs = [prose(rng, 60) for _ in range(400)]
    positions = clusters_of([text for first in pairs for text in (first, first.upper())])[1]
    assert 0.45 < positions.mean() < 0.55  # and not, say, the lower of two hashes


def seen(held_out, train):
    mine, theirs = RunSample(), RunSample()
    for sample, texts in ((mine, held_out), (theirs, train)):
        for text in texts:
            sample.add(text)
    return mine.share_in(theirs)


@given(st.lists(st.text("ab", min_size=45, max_size=70), max_size=5), st.lists(st.text("ab", max_size=150), max_size=5))
def test_the_share_seen_is_exact_for_short_text(held_out, train):
    train = [*train, *(text[:60] for text in held_out[:1])]
    runs = {text[i : i + RUN_BYTES] for text in train for i in range(len(text) - RUN_BYTES + 1)}
    mine = [text[i : i + RUN_BYTES] for text in held_out for i in range(len(text) - RUN_BYTES + 1)]
    wanted = sum(run in runs for run in mine) / len(mine) if mine else None
    assert seen(held_out, train) == (wanted if wanted is None else pytest.approx(wanted))


def test_the_share_seen_is_near_for_long_text(monkeypatch):
    rng = random.Random(2)
    texts = [prose(rng, 400) for _ in range(60)]
    monkeypatch.setattr("tale_jax.data.duplicates.MAX_SAMPLED_RUNS", 20_000)
    monkeypatch.setattr("tale_jax.data.duplicates.SEGMENT_BYTES", 1000)
    assert seen(texts[:20], texts[10:]) == pytest.approx(0.5, abs=0.08)
    assert seen(texts[:20], texts[20:]) == 0.0
    assert seen(["short"], texts) is None


def leaked(path, **settings):
    """The share of held-out documents' runs that training has, over `words_only`, so that line ends hide nothing."""
    changes = {f"corpus.{name}": value for name, value in settings.items()}
    config = build_config(**{"corpus.name": "files", "corpus.path": str(path), **changes})
    corpus = open_corpus(config.corpus, config.seed)
    words = {split: [words_only(text.encode()).decode() for text in corpus.documents(split)] for split in SPLITS}
    return seen([*words["valid"], *words["test"]], words["train"])


@pytest.mark.parametrize("change", ["line ends", "quotes", "capitals", "a sentence more", "a typo a line"])
@pytest.mark.parametrize("held_out", [0.05, 0.15])
def test_both_printings_of_a_book_land_on_one_side(tmp_path, change, held_out):
    book = prose(random.Random(3), 30_000)
    (tmp_path / "first.txt").write_text(book, newline="")
    (tmp_path / "second.txt").write_text(CHANGES[change](book), newline="")
    assert leaked(tmp_path, held_out=held_out) < 0.05


@pytest.mark.skipif(not FAULTS.is_dir(), reason="needs ../shared/faults")
def test_the_two_editions_of_the_faults(tmp_path):
    assert leaked(FAULTS / "edition", held_out=0.15) < 0.01
