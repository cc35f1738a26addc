"""Exported .gguf files in llama.cpp: the same logits, greedy text and ids as ours; the Modelfile's settings work."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from interchange import (
    NEVER,
    TEXT,
    VARIANTS,
    byte_level_tokenizer,
    greedy_ids,
    hard_texts,
    logits_of,
    make_experiment,
    some_ids,
)

from tale_jax.convert.formats import export_model
from tale_jax.data.json_tokenizer import JsonTokenizer, pack
from tale_jax.runs.experiment import Experiment

pytestmark = pytest.mark.interop
llama_cpp = pytest.importorskip("llama_cpp", reason="needs the interop extra: make test-interop")
GREEDY = 200
FLOAT32 = 0  # GGML's number: the cache is in float16 by default
DTYPES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": 5e-1}  # largest difference of a logit


def open_llama(path: Path, context: int = 256):
    options = {"n_ctx": context, "logits_all": True, "verbose": False, "n_threads": 1}
    return llama_cpp.Llama(str(path), type_k=FLOAT32, type_v=FLOAT32, **options)


def logits_in_llama(model, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def mean_nats(logits: np.ndarray, ids: list[int]) -> float:
    logits = logits[:-1].astype(np.float64)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return float(np.mean(total - logits[np.arange(len(ids) - 1), ids[1:]]))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(tmp_path, name, dtype, table):
    experiment = make_experiment(tmp_path, **VARIANTS[name])
    ids = some_ids(experiment, 120)
    export_model(experiment, "gguf", tmp_path / "x.gguf", dtype)
    ours, theirs = logits_of(experiment, ids), logits_in_llama(open_llama(tmp_path / "x.gguf"), ids)
    difference = abs(ours - theirs)
    worse = np.exp(mean_nats(theirs, ids) - mean_nats(ours, ids)) - 1
    row = {"max": float(difference.max()), "mean": float(difference.mean()), "perplexity %": float(100 * worse)}
    table("logits in llama.cpp", model=name, dtype=dtype, **row)
    assert difference.max() < DTYPES[dtype] and abs(worse) < 0.02


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_text(tmp_path, name, table):
    experiment = make_experiment(tmp_path, **VARIANTS[name])
    ids = some_ids(experiment)
    export_model(experiment, "gguf", tmp_path / "x.gguf")
    model = open_llama(tmp_path / "x.gguf")
    model.eval(ids)
    found = []
    for _ in range(GREEDY):
        logits = np.array(model.scores[model.n_tokens - 1])
        logits[list(NEVER)] = -np.inf
        found.append(int(logits.argmax()))
        model.eval(found[-1:])
    ours = greedy_ids(experiment, ids, GREEDY)
    table("greedy in llama.cpp", model=name, same=sum(map(int.__eq__, ours, found)), of=GREEDY)
    assert ours == found


def ids_in_llama(experiment: Experiment, path: Path, texts: list[str]) -> list[list[int]]:
    export_model(experiment, "gguf", path)
    model = open_llama(path)
    return [model.tokenize(text.encode(), add_bos=False, special=False) if text else [] for text in texts]


def test_ids_of_our_tokenizer(tmp_path, table):
    """All but those of U+2581, which llama.cpp takes for a space."""
    experiment = make_experiment(tmp_path)
    texts = [text for text in hard_texts() if "\u2581" not in text]
    found = ids_in_llama(experiment, tmp_path / "x.gguf", texts)
    same = [experiment.tokenizer.encode(text).tolist() == ids for text, ids in zip(texts, found, strict=True)]
    table("ids in llama.cpp", tokenizer="ours", same=sum(same), of=len(texts))
    assert all(same), [text for text, good in zip(texts, same, strict=True) if not good][:5]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_ids_of_byte_level_tokenizers(tmp_path, kind, table):
    """Nearly all: llama.cpp does not normalise, as Qwen's tokenizer does."""
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = JsonTokenizer(pack(byte_level_tokenizer(kind).to_str(), settings))
    experiment = make_experiment(tmp_path, tokenizer, **{"model.qk_norm": kind == "qwen2"})
    texts = [text for text in hard_texts() if "<|" not in text]
    found = ids_in_llama(experiment, tmp_path / "x.gguf", texts)
    same = [tokenizer.encode(text).tolist() == ids for text, ids in zip(texts, found, strict=True)]
    table("ids in llama.cpp", tokenizer=kind, same=sum(same), of=len(texts))
    composed = [unicodedata.is_normalized("NFC", text) for text in texts]
    assert all(good or (kind == "qwen2" and not plain) for good, plain in zip(same, composed, strict=True))


def test_the_modelfile_says_how_to_run_the_model(tmp_path, trained, cpu):
    from tale_jax.runs.experiment import open_experiment

    export_model(open_experiment(trained, cpu), "ollama", tmp_path / "tales", "q8_0")
    text = (tmp_path / "tales" / "Modelfile").read_text()
    values = dict(re.findall(r"PARAMETER (\w+) (\S+)", text))
    model = open_llama(tmp_path / "tales" / re.findall(r"FROM \./(\S+)", text)[0], int(values["num_ctx"]))
    prompt = re.findall(r'TEMPLATE """(.*)"""', text)[0].replace("{{ .Prompt }}", "Once")
    sampling = {name: float(values[name]) for name in ("temperature", "top_p", "min_p", "repeat_penalty")}
    stop = re.findall(r'PARAMETER stop "(.*)"', text)
    made = model.create_completion(prompt, max_tokens=60, stop=stop, seed=1, top_k=int(values["top_k"]), **sampling)
    assert made["usage"]["completion_tokens"] > 3
    assert TEXT and made["choices"][0]["text"]
