"""Exported folders in transformers 4.57 and 5: the same logits, greedy text and ids as ours. `make test-interop`.

`TALE_JAX_WRITE_AGREEMENT=1 make test-interop` stores some of what transformers 5 says, for the quick suite.
"""

import json
import os
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from interchange import (
    NEVER,
    TRANSFORMERS,
    VARIANTS,
    ask_transformers,
    byte_level_tokenizer,
    greedy_ids,
    hard_texts,
    logits_of,
    make_experiment,
    our_tokenizer,
    some_ids,
)

from tale_jax.convert.formats import export_model
from tale_jax.data.json_tokenizer import JsonTokenizer, pack
from tale_jax.runs.experiment import Experiment

pytestmark = pytest.mark.interop
GREEDY = 200
STORED = ROOT / "tests" / "convert" / "agreement.json"
DTYPES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}  # largest difference of a logit
KINDS = ("gpt-2", "smollm", "qwen2")


def byte_level(kind: str) -> JsonTokenizer:
    marks = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    return JsonTokenizer(pack(byte_level_tokenizer(kind).to_str(), settings))


@pytest.fixture(scope="session")
def experiments(tmp_path_factory) -> dict[str, Experiment]:
    folder = tmp_path_factory.mktemp("workdirs")
    made = {name: make_experiment(folder, **changes) for name, changes in VARIANTS.items()}
    for kind in KINDS:
        made[kind] = make_experiment(folder, byte_level(kind), **{"model.qk_norm": kind == "qwen2"})
    return made


@pytest.fixture(scope="session", params=TRANSFORMERS)
def answers(request, experiments, tmp_path_factory) -> dict[tuple[str, str], Any]:
    """What one version says of each model in each dtype."""
    folder = tmp_path_factory.mktemp("transformers")
    requests, keys = [], []
    for name, experiment in experiments.items():
        for dtype in DTYPES if name in VARIANTS else ("float32",):
            out = folder / f"{name} {dtype}"
            export_model(experiment, "huggingface", out, dtype)
            one = {"folder": str(out), "ids": some_ids(experiment)}
            if dtype == "float32" and name in VARIANTS:
                one |= {"greedy": GREEDY, "never": NEVER}
            if name in ("qwen3", *KINDS) and dtype == "float32":
                one |= {"texts": hard_texts()}
            requests.append(one)
            keys.append((name, dtype))
    result = ask_transformers(request.param, requests, folder)
    return {"version": result["version"], **dict(zip(keys, result["answers"], strict=True))}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(experiments, answers, name, dtype, table):
    experiment, found = experiments[name], answers[name, dtype]
    c = experiment.config.model
    assert found["class"] == ("Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM")
    assert found["tied"] == c.tie_embeddings
    ours, theirs = logits_of(experiment, some_ids(experiment)), np.array(found["logits"])
    difference = abs(ours - theirs)
    row = {"max": float(difference.max()), "mean": float(difference.mean()), "largest": float(abs(ours).max())}
    table("logits", transformers=answers["version"], model=name, dtype=dtype, **row)
    assert difference.max() < DTYPES[dtype]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_text(experiments, answers, name, table):
    experiment, found = experiments[name], answers[name, "float32"]["greedy"]
    ours = greedy_ids(experiment, some_ids(experiment), GREEDY)
    table("greedy", transformers=answers["version"], model=name, same=sum(map(int.__eq__, ours, found)), of=GREEDY)
    assert ours == found


@pytest.mark.parametrize("name", ["qwen3", *KINDS])
def test_ids_of_ten_thousand_texts(experiments, answers, name, table):
    tokenizer, found = experiments[name].tokenizer, answers[name, "float32"]
    same = [tokenizer.encode(text).tolist() == ids for text, ids in zip(hard_texts(), found["texts"], strict=True)]
    table("ids", transformers=answers["version"], tokenizer=name, same=sum(same), of=len(same))
    assert all(same)
    if name == "qwen3":  # special tokens that a text spells are text, without being asked; the begin mark comes first
        assert found["plain_call"] == [our_tokenizer().bos_id, *our_tokenizer().encode("Once </s>").tolist()]
        assert found["decoded"] == "Once  upon"


def test_what_the_quick_suite_compares_with(experiments, answers):
    """Numbers in agreement.json are those of this version."""
    if os.environ.get("TALE_JAX_WRITE_AGREEMENT") and answers["version"].startswith("5"):
        stored = {}
        for name in VARIANTS:
            one, ids = answers[name, "float32"], some_ids(experiments[name])
            logits = [round(x, 6) for x in one["logits"][-1][:40]]
            stored[name] = {"ids": ids, "logits": logits, "greedy": one["greedy"][:40]}
        STORED.write_text(json.dumps(stored) + "\n")
    for name, stored in json.loads(STORED.read_text()).items():
        found = answers[name, "float32"]
        np.testing.assert_allclose(found["logits"][-1][:40], stored["logits"], atol=2e-5)
        assert found["greedy"][:40] == stored["greedy"]
