"""Rows of conversations: every shape found by itself, what is wrong named with its place, and prepared with marks."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import build_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tale_jax.data.chat import conversation
from tale_jax.data.chat_template import DEFAULT_TEMPLATE, TEMPLATE_FILE, ChatTemplate
from tale_jax.data.corpus import open_corpus
from tale_jax.data.encode import Chats, encode, stream_dtype
from tale_jax.data.marks import DTYPE, FIRST, LEARNED, MARKED, is_learned, token_ids
from tale_jax.data.prepare import describe, prepare
from tale_jax.data.token_files import document_starts, iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file, train_tokenizer

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}


def talk(number):
    return [{"role": "user", "content": f"Who had coin {number}?"}, {"role": "assistant", "content": f"Fox {number}."}]


SHAPES = {
    "messages": lambda n: {"messages": talk(n)},
    "prompt, completion": lambda n: {"prompt": talk(n)[0]["content"], "completion": talk(n)[1]["content"]},
    "prompt, response": lambda n: {"id": n, "prompt": talk(n)[0]["content"], "response": talk(n)[1]["content"]},
    "lists": lambda n: {"prompt": talk(n)[:1], "completion": talk(n)[1:]},
    "parts": lambda n: {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in talk(n)]},
}


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus_of(path, **changes):
    return open_corpus(build_config(**{"corpus.name": "files", "corpus.path": str(path), **changes}).corpus, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_found_by_itself(tmp_path, shape, suffix):
    corpus = corpus_of(write_rows(tmp_path / f"rows{suffix}", [SHAPES[shape](n) for n in range(40)]))
    assert corpus.chat
    found = [json.loads(text)["messages"] for split in ("train", "valid", "test") for text in corpus.documents(split)]
    assert sorted(map(json.dumps, found)) == sorted(json.dumps(talk(n)) for n in range(40))
    assert sorted(text for split in ("train", "valid", "test") for text in corpus.texts(split)) == sorted(
        message["content"] for n in range(40) for message in talk(n)
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_and_calls_are_kept(tmp_path, suffix):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"depth": 3}}}]
    calls = [{"function": {"name": "look", "arguments": '{"where": "barn"}'}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "fox"}]
    rows = [{"messages": [*messages, {"role": "assistant", "content": f"Fox {n}"}], "tools": tools} for n in range(40)]
    kept = json.loads(next(corpus_of(write_rows(tmp_path / f"rows{suffix}", rows)).documents("train")))
    assert kept["tools"] == tools and kept["messages"][1]["tool_calls"] == calls
    assert [set(message) for message in kept["messages"]] == [
        {"role", "content"}, {"role", "content", "tool_calls"}, {"role", "content"}, {"role", "content"}
    ]  # fmt: skip


def test_a_row_with_the_named_text_is_text(tmp_path):
    words = [" ".join(f"word{n * i}" for i in range(30)) for n in range(1, 41)]
    rows = [{"text": text, "prompt": text[:20], "completion": f"y{n}"} for n, text in enumerate(words)]
    assert not corpus_of(write_rows(tmp_path / "rows.jsonl", rows)).chat
    chat = corpus_of(tmp_path / "rows.jsonl", **{"corpus.field": "messages"})
    assert chat.chat and json.loads(next(chat.documents("train")))["messages"][1]["content"].startswith("y")


PLACE = "rows.jsonl line 3"
BAD = [
    ({"messages": []}, "messages must be an array of objects, not empty"),
    ({"messages": "hello"}, "messages must be an array"),
    ({"messages": ["hello"]}, "message 1 must be an object"),
    ({"messages": [{"content": "x"}]}, "role=null must be one of system, developer, user, assistant, tool"),
    ({"messages": [{"role": "bot", "content": "x"}]}, 'message 1: role="bot" must be one of'),
    ({"messages": [ANSWER]}, "role=assistant must follow user or tool, but is the first"),
    ({"messages": [USER, USER, ANSWER]}, "message 2: role=user must follow .* but follows user"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "x"}]}, "message 3: role=system must follow nothing"),
    ({"messages": [USER, ANSWER, USER]}, "must end with an answer of assistant, but end with user"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2: the response of assistant must not be empty"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "the response of assistant must not be empty"),
    ({"messages": [{"role": "user"}, ANSWER]}, "message 1: the content of user must not be empty"),
    ({"messages": [USER | {"content": 3}, ANSWER]}, "content must be text"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]}, "content must be text; pictures and sound"),
    ({"messages": [USER | {"content": "\ud83d"}, ANSWER]}, "must not hold half a surrogate pair"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, r'message 1: role=\["user"\] must be one of'),
    ({"messages": [USER, ANSWER], "tools": "look"}, "tools must be an array"),
    ({"messages": [USER, ANSWER], "tools": ["look"]}, "tools must be an array of objects"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": "look"}]}, "message 2: tool_calls must be an array of"),
    ({"prompt": "x", "completion": ""}, "the response of assistant must not be empty"),
    ({"prompt": "x", "response": None}, "the response of assistant must not be empty"),
    ({"question": "x", "answer": "y"}, "must have messages, or prompt and completion .* it has question, answer"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, row, reason):
    rows = [{"messages": talk(n)} for n in range(40)]
    corpus = corpus_of(write_rows(tmp_path / "rows.jsonl", [*rows[:2], row, *rows[2:]]))
    with pytest.raises(ValueError, match=f"{PLACE}.*{reason}") as error:
        list(corpus.documents("train"))
    assert "\n" not in str(error.value) and "; " in str(error.value)
    write_rows(tmp_path / "rows.jsonl", rows)  # without that row
    assert list(corpus_of(tmp_path / "rows.jsonl").documents("train"))


NAMES = st.sampled_from("messages tools prompt completion response role content tool_calls name type text".split())
WORDS = st.sampled_from(["user", "assistant", "tool", "system", "text", "</s>", "", " ", "é\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)
MESSAGE = st.fixed_dictionaries({"role": WORDS, "content": WORDS | VALUES}, optional={"tool_calls": VALUES}) | VALUES
ROWS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)}, optional={"tools": VALUES}
) | st.fixed_dictionaries({"prompt": WORDS | VALUES, "completion": WORDS | VALUES})


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"Who had coin {number}? Fox {number} had it.\n" for number in range(300)]
    return train_tokenizer(texts, dataclasses.replace(build_config().tokenizer, vocab_size=300))


@settings(max_examples=300, deadline=None, database=None)
@given(ROWS)
@example({"messages": [USER | {"role": {}}]})
@example({"messages": [USER, ANSWER | {"tool_calls": [{"a": float("nan")}]}]})
def test_a_row_of_any_shape_is_a_conversation_or_one_line(tokenizer, row):
    fault = document = ""
    try:
        document = conversation(row, PLACE)
    except ValueError as error:
        fault = str(error)
    assert "\n" not in fault and len(fault) < 400 and (document or fault.startswith(PLACE))
    if document:
        [(ids, learned)] = ChatTemplate(tokenizer, DEFAULT_TEMPLATE).learned(**json.loads(document))
        assert len(ids) == len(learned) and any(learned) and document.encode()


def test_a_file_of_text_beside_conversations_is_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"messages": talk(n)} for n in range(40)])
    (tmp_path / "b.txt").write_text("text " * 2000)
    with pytest.raises(ValueError, match=r"b.txt must hold conversations, .* in rows of .jsonl.*; move it elsewhere"):
        list(corpus_of(tmp_path).documents("train"))
    (tmp_path / "b.txt").rename(tmp_path / ".b.txt")
    assert list(corpus_of(tmp_path).documents("train"))


def test_conversations_are_prepared_with_marks(tmp_path):
    long = {"prompt": "And " * 80, "completion": "Yes. " * 20}
    path = write_rows(tmp_path / "rows.jsonl", [*(SHAPES["messages"](n) for n in range(200)), long])
    changes = {"corpus.name": "files", "corpus.path": str(path), "tokenizer.vocab_size": 300, "model.seq_len": 64}
    config = build_config(**changes)
    prepared = prepare(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / TEMPLATE_FILE).read_text() == DEFAULT_TEMPLATE
    manifests = prepared.manifests.values()
    assert sum(m.chat["rows"] for m in manifests) == 201 and sum(m.chat["truncated"] for m in manifests) == 1
    assert sum(m.bytes for m in manifests) == sum(len(f"Fox {n}.") for n in range(200)) + 100
    for split, manifest in prepared.manifests.items():
        tokens, _ = load_tokens(tmp_path / "run", split)
        assert tokens.dtype == DTYPE and manifest.chat["learned_tokens"] == is_learned(tokens, MARKED).sum()
        ids = token_ids(tokens, MARKED)
        starts = document_starts(tokens, prepared.tokenizer.bos_id)
        assert len(starts) == manifest.documents == manifest.chat["rows"] and (ids[starts] == 1).all()
        assert (ids == prepared.tokenizer.eos_id).sum() == 2 * len(starts)
        learned = prepared.tokenizer.decode(ids[is_learned(tokens, MARKED)].tolist())
        assert set(learned) <= set("Fox 0123456789.Yes")
        text = next(iter(iter_documents(tokens, prepared.tokenizer)))
        assert text.startswith("user\n") and "\nassistant\n" in text
    line = describe(prepared.manifests["train"])
    assert f"{prepared.manifests['train'].chat['rows']} rows of conversations" in line and "masked" in line
    assert "truncated, to the 64 tokens of a window" in line

    assert prepare(config, tmp_path / "run").chat  # nothing has changed
    (tmp_path / "run" / "tokenizer" / TEMPLATE_FILE).write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"chat_template.jinja must be the one that .* was prepared with; restore it"):
        prepare(config, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / TEMPLATE_FILE).write_text(DEFAULT_TEMPLATE)
    prepare(config, tmp_path / "run")


def test_a_template_that_refuses_a_row_names_it(trained):
    pytest.importorskip("jinja2")
    tokenizer = Tokenizer.load(tokenizer_file(trained))
    refusing = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + DEFAULT_TEMPLATE
    text = conversation({"messages": [*talk(1), *talk(2)]}, "")
    with pytest.raises(
        ValueError, match=r'begins with "Who had coin 1.*refuses this conversation: too long; correct or'
    ):
        list(encode([text], tokenizer, 8, chats=Chats(refusing, 64)))
    assert list(encode([conversation({"messages": talk(1)}, "")], tokenizer, 8, chats=Chats(refusing, 64)))


def test_text_of_a_tokenizer_whose_bos_is_its_eos_has_marks(trained):
    tokenizer = Tokenizer.load(tokenizer_file(trained))
    tokenizer.eos_id = tokenizer.bos_id
    assert stream_dtype(tokenizer) == DTYPE
    [batch] = encode(["One.", "Two."], tokenizer, 8)
    tokens = np.frombuffer(batch.tokens, DTYPE)
    assert document_starts(tokens, tokenizer.bos_id).tolist() == [0, len(tokenizer.encode("One.")) + 2]
    assert (is_learned(tokens, MARKED) == ((tokens & FIRST) == 0)).all() and tokens[-1] == tokenizer.bos_id | LEARNED
    assert list(iter_documents(tokens, tokenizer)) == ["One.", "Two."]


def test_a_conversation_is_written_in_one_way():
    row = {"messages": [{"content": "x", "role": "user", "extra": 1}, ANSWER], "id": 5}
    assert conversation(row, "") == conversation({"prompt": "x", "completion": "A fox."}, "")


def test_32_bit_tokens_of_an_older_workdir_get_their_marks(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "old")
    folder = tmp_path / "old" / "windows"
    plain, manifest = load_tokens(trained, "valid")
    plain.astype(DTYPE).tofile(folder / "valid.bin")
    values = dataclasses.asdict(manifest) | {"dtype": "<u4", "format_version": 1}
    del values["has_marks"], values["chat"], values["sha256"]
    (folder / "valid.json").write_text(json.dumps(values))
    tokens, _ = load_tokens(tmp_path / "old", "valid")
    assert (token_ids(tokens, MARKED) == plain).all()
    assert (is_learned(tokens, MARKED) == (plain != 1)).all()
    assert (document_starts(tokens, 1) == document_starts(plain, 1)).all()
