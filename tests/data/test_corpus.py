"""Every corpus streams its documents unaltered, cuts its splits by the text alone, and says clearly what is wrong."""

import builtins
import importlib
import itertools
import json
import random
import tracemalloc

import pytest
from helpers import ROOT, build_config

from tale_jax.data.corpus import SPLITS, open_corpus
from tale_jax.data.encode import count_words
from tale_jax.data.tales import grammar

WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"


@pytest.fixture
def opened():
    """open_corpus with settings by name: opened("files", path=..., field=...)."""

    def opened(name, **settings):
        changes = {f"corpus.{key}": str(value) if key == "path" else value for key, value in settings.items()}
        config = build_config(**{"corpus.name": name}, **changes)
        return open_corpus(config.corpus, config.seed)

    return opened


def documents(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def together(corpus):
    return list(itertools.chain.from_iterable(documents(corpus).values()))


def write_stories(folder, numbers):
    for number in numbers:
        (folder / f"story-{number:03}.txt").write_text(f"The {number}th story.\n\nIt is short, and it ends.\n")


def test_tales_of_all_splits_differ_and_have_a_probability(opened):
    corpus = opened("tales", num_train_tales=60, num_valid_tales=20, num_test_tales=20)
    texts = documents(corpus)
    assert [len(texts[split]) for split in SPLITS] == [60, 20, 20]
    assert len(set().union(*texts.values())) == 100
    assert list(corpus.nats("valid")) == [-grammar.judge(text).logprob for text in texts["valid"]]
    assert corpus.num_bytes("train") == pytest.approx(sum(len(t) for t in texts["train"]), rel=0.2)
    assert documents(corpus) == texts
    assert (
        documents(opened("tales", num_train_tales=5, num_valid_tales=5, num_test_tales=5))["test"] == texts["test"][:5]
    )


def test_wikitext_articles_join_to_the_file(opened, tmp_path):
    article = " = {} = \n \n First , words . \n = Row ; of a table = \n \n = = Part = = \n \n More . \n \n"
    text = " \n" + "".join(article.format(title) for title in ("Bears", "x = y", "<unk>"))
    for split in SPLITS:
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    corpus = opened("wikitext2", path=tmp_path)
    for split in SPLITS:
        articles = list(corpus.documents(split))
        assert "".join(articles) == text
        assert [a.strip().split("\n")[0].strip() for a in articles] == ["= Bears =", "= x = y =", "= <unk> ="]
        assert corpus.num_bytes(split) == len(text)
    assert count_words(" = Bears = \n \n First , words . \n", corpus.words_end_lines) == 10


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="needs ../shared/data/wikitext-2")
@pytest.mark.parametrize(("split", "words", "articles"), [("valid", 217_646, 60), ("test", 245_569, 60)])
def test_wikitext2_has_the_published_word_counts(opened, split, words, articles):
    corpus = opened("wikitext2", path=WIKITEXT)
    texts = list(corpus.documents(split))
    assert sum(count_words(text, corpus.words_end_lines) for text in texts) == words
    assert len(texts) == articles
    assert "".join(texts).encode() == (WIKITEXT / f"{split}.txt").read_bytes()


def test_tinystories_from_a_folder_and_from_one_file(opened, tmp_path):
    stories = [f"Once there was a cat named {n}.\nIt sat." for n in range(60)]
    for name in ("train", "valid"):
        text = "\n<|endoftext|>\n".join(f"{story} {name}" for story in stories)
        (tmp_path / f"TinyStoriesV2-GPT4-{name}.txt").write_text(text)
    texts = documents(opened("tinystories", path=tmp_path))
    assert texts["train"] == [f"{story} train" for story in stories]
    assert sorted(texts["valid"] + texts["test"]) == sorted(f"{story} valid" for story in stories)
    texts = together(opened("tinystories", path=tmp_path / "TinyStoriesV2-GPT4-train.txt", held_out=0.2))
    assert sorted(texts) == sorted(f"{story} train" for story in stories)


def test_adding_files_moves_no_document(opened, tmp_path):
    write_stories(tmp_path, range(100))
    before = documents(opened("files", path=tmp_path, held_out=0.2))
    write_stories(tmp_path, range(100, 150))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "copy.txt").write_bytes((tmp_path / "story-001.txt").read_bytes())
    after = documents(opened("files", path=tmp_path, held_out=0.2))
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)
    assert not set(after["train"]) & set(after["valid"])
    assert sum(map(len, after.values())) == 151
    assert len(before["valid"]) == pytest.approx(20, abs=12)


def test_files_of_every_kind_by_folder_and_glob(opened, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_stories(tmp_path, range(30))
    rows = [{"story": f"Row {n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"story": ""}])) + "\n\n")
    parquet.write_table(pyarrow.table({"n": [1, 2], "story": ["Column 1", None]}), tmp_path / "rows.parquet")
    texts = together(opened("files", path=tmp_path, field="story", held_out=0.2))
    assert len(texts) == 61
    assert {"Row 7", "Column 1"} <= set(texts)
    texts = together(opened("files", path=tmp_path / "story-*.txt", held_out=0.2))
    assert len(texts) == 30


def test_one_book_gives_every_split_and_its_paragraphs_stay_whole(opened, tmp_path):
    random.seed(0)
    paragraphs = [" ".join(f"word{random.randrange(999)}" for _ in range(50)) for _ in range(500)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    texts = together(opened("files", path=tmp_path / "book.txt"))
    assert sorted(p for text in texts for p in text.strip("\n").split("\n\n")) == sorted(paragraphs)


@pytest.mark.slow
def test_a_large_file_is_never_held(opened, tmp_path):
    line = b"It rained, and the little boat went on and on over the grey sea. " * 20 + b"\n"
    with (tmp_path / "large.txt").open("wb") as file:
        for number in range(400):
            file.write(b"%d. " % number + line * 50 + b"\n")  # 26 MB
    corpus = opened("files", path=tmp_path)
    importlib.import_module("datasketch")  # compares documents, and takes memory of its own
    importlib.import_module("scipy.sparse.csgraph")
    tracemalloc.start()
    total = sum(len(text) for text in corpus.documents("train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 20_000_000
    assert peak < 12_000_000  # blocks


def test_max_train_bytes_ends_reading(opened, tmp_path):
    write_stories(tmp_path, range(300))
    everything = documents(opened("files", path=tmp_path, held_out=0.1))
    texts = documents(opened("files", path=tmp_path, held_out=0.1, max_train_bytes=5000))
    assert 4900 < sum(map(len, texts["train"])) <= 5000
    for split in SPLITS:
        assert texts[split] == everything[split][: len(texts[split])]


def test_an_empty_file_among_others_is_left_out_and_counted(opened, tmp_path):
    write_stories(tmp_path, range(20))
    (tmp_path / "empty.txt").touch()
    corpus = opened("files", path=tmp_path)
    assert corpus.notes == ("1 file was not read: 1 empty (hidden files are left out)",)
    assert len(together(corpus)) == 20


def test_hub_rows_by_their_own_splits_and_cut_by_hash(opened, hub):
    hub["train"] = [{"text": f"Row {n}"} for n in range(200)]
    hub["validation"] = [{"text": "Held out"}, {"text": ""}]
    texts = documents(opened("hub", hub_name="someone/tales", test_split="", held_out=0.1))
    assert texts["valid"] == ["Held out"]
    assert sorted(texts["train"] + texts["test"]) == sorted(row["text"] for row in hub["train"])
    assert len(texts["test"]) == pytest.approx(20, abs=12)
    hub["train"] = [{"text": line} for line in ("", " = A = \n", "", " One . \n", "")]
    assert list(opened("wikitext2").documents("train")) == [" \n = A = \n \n One . \n \n"]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the library datasets, which serves what is put here by split."""
    splits = {}

    class Datasets:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            assert streaming
            if split == "offline":
                raise ConnectionError("no route\nto host")
            return splits[split]

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    return splits


# --- what is wrong, in one line ---------------------------------------------------------------------------------------


def says(corpus_of, *parts):
    """Reads a corpus and returns the error, which must be one line and hold all parts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        documents(corpus_of())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("name", ["files", "wikitext2", "tinystories"])
def test_a_missing_path(opened, tmp_path, name):
    says(lambda: opened(name, path=tmp_path / "nowhere"), f"corpus.path={tmp_path}/nowhere", "does not exist")


def test_a_folder_without_text(opened, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    says(lambda: opened("files", path=tmp_path), ".parquet files", "1 .png")
    says(lambda: opened("wikitext2", path=tmp_path), "train.txt or wiki.train.tokens")
    (tmp_path / "empty.txt").touch()
    says(lambda: opened("files", path=tmp_path), "not empty", "1 empty")


def test_undecodable_bytes(opened, tmp_path):
    write_stories(tmp_path, range(40))
    (tmp_path / "latin.txt").write_bytes(b"x" * 40_000 + b"caf\xe9 au lait")
    says(lambda: opened("files", path=tmp_path), "latin.txt", "0xe9", "offset 40003", "iconv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    says(lambda: opened("files", path=tmp_path / "latin.jsonl"), "latin.jsonl", "0xe9", "offset 28")
    (tmp_path / "stories.txt").write_bytes(b"One<|endoftext|>Two \xff")
    says(lambda: opened("tinystories", path=tmp_path / "stories.txt"), "stories.txt", "0xff", "offset 20")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"body": "x", "title": "y"}', ["corpus.field=text", "line 2", "body, title"]),
        ('{"text": 3}', ["corpus.field=text", "line 2", "a number"]),
        ('{"text": "x"', ["line 2", "must be a JSON object"]),
        ('["x"]', ["line 2", "must be a JSON object"]),
        (r'{"text": "\ud83d"}', ["line 2", "surrogate"]),
    ],
)
def test_bad_rows(opened, tmp_path, line, parts):
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n' + line + "\n")
    says(lambda: opened("files", path=tmp_path / "rows.jsonl"), "rows.jsonl", *parts)


def test_bad_columns(opened, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "rows.parquet")
    says(lambda: opened("files", path=tmp_path), "corpus.field=text", "rows.parquet", "body")
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    says(lambda: opened("files", path=tmp_path), "rows.parquet", "must be a parquet file")


def test_too_little_text_says_how_much_is_needed(opened, tmp_path):
    write_stories(tmp_path, [1])
    says(lambda: opened("files", path=tmp_path), f"corpus.path={tmp_path}", "at least 5,000 bytes", "holds 42", "add")
    says(lambda: opened("files", path=tmp_path, max_train_bytes=20), "set --config.corpus.max_train_bytes=5000")
    (tmp_path / "story-001.txt").write_text(" \n" * 9000)
    says(lambda: opened("files", path=tmp_path), "white space")
    (tmp_path / "story-001.txt").unlink()
    (tmp_path / "rows.jsonl").write_text('{"text": "the same"}\n' * 900)
    says(lambda: opened("files", path=tmp_path), "three documents that differ", "does not repeat itself")


def test_the_hub_without_its_library_or_a_network(opened, hub, monkeypatch):
    says(lambda: opened("hub", hub_name="a/b", train_split="offline"), "a/b", "ConnectionError: no route", "network")
    hub["train"] = [{"story": "x"}]
    says(lambda: opened("hub", hub_name="a/b"), "corpus.field=text", "a/b", "story")
    monkeypatch.delitem(__import__("sys").modules, "datasets")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    says(lambda: opened("hub", hub_name="a/b"), "needs datasets, which is not installed", "hub", "corpus.path")
    says(lambda: opened("wikitext2"), "needs datasets, which is not installed", "hub", "corpus.path")
    says(lambda: opened("tinystories"), "needs datasets, which is not installed", "hub", "corpus.path")
