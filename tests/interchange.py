"""What tests of conversion share: small models of every shape, texts that are hard to tokenize, foreign tokenizers.

Weights come from numpy's generator, so that they are the same in every environment: what `transformers` and llama.cpp
made of them is stored in `tests/convert/agreement.json` (see `tests/interop`).
"""

import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import build_config

from tale_jax.config import Config, TokenizerConfig
from tale_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from tale_jax.model.adapters import Adapted, init_adapters, merged
from tale_jax.model.transformer import Transformer
from tale_jax.runs.experiment import Experiment

TEXT = [
    "Once upon a time there was a fox. The fox had a red tail,\nand a red hat!\n\nIt went to the town. ",
    "“Where is the town?” asked the fox – nobody knew.\tThe crow, who was old, said: go on and on.",
    "x = 3.14; y = 2025\n    if x > y:\n        return None\r\n  'tis we'll I'm they're ÜBER naïve Ωmega",
]
SHAPE = {"model.num_layers": 2, "model.embed_dim": 64, "model.num_heads": 4, "model.mlp_dim": 96, "model.seq_len": 256}
SHAPE |= {"model.induction_init": False}
LLAMA = {"model.qk_norm": False}
UNTIED = {"model.tie_embeddings": False}
PLAIN = {"model.scale_embeddings": False}
# Tied and untied, grouped heads, normalised queries and keys, heads of a width of their own, scaled positions.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 untied, grouped": UNTIED | {"model.num_kv_heads": 2},
    "qwen3 plain, wide heads": PLAIN | {"model.head_dim": 32, "model.num_kv_heads": 1},
    "llama": LLAMA,
    "llama untied": LLAMA | UNTIED | PLAIN,
    "llama grouped": LLAMA | {"model.num_kv_heads": 2},
    "llama scaled positions": LLAMA | PLAIN | {"model.rope_scaling": 8.0, "model.rope_original_len": 32},
    "llama uneven": LLAMA | UNTIED | {"model.embed_dim": 72, "model.num_heads": 3, "model.mlp_dim": 100},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora.rank": 4, "lora.alpha": 8.0},
    "rslora, some": {"lora.rank": 4, "lora.rank_stabilized": True, "lora.matrices": "query,down", "lora.dropout": 0.1},
    "dora": {"lora.rank": 4, "lora.dora": True},
}
SPECIAL_TEXTS = ("<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<|endoftext|>", "<|im_start|>", "<s", "[INST]")
EMOJI = ("🧙", "🧙🏽‍♀️", "👨‍👩‍👧‍👦", "🇩🇪", "1️⃣", "❤️", "🏴‍☠️")


@functools.cache
def our_tokenizer(vocab_size: int = 360) -> SentencePieceTokenizer:
    return train_tokenizer(TEXT * 5, TokenizerConfig(vocab_size, "", 10_000_000))


def make_experiment(workdir: Path, tokenizer: Tokenizer | None = None, seed: int = 0, **changes: Any) -> Experiment:
    """A model with random weights, none of them 0 or 1, that `open_experiment` might have opened."""
    tokenizer = tokenizer or our_tokenizer()
    config = build_config(**SHAPE | {"tokenizer.vocab_size": tokenizer.vocab_size, "tokenizer.path": "x"} | changes)
    model = Transformer(config.model, config.tokenizer.vocab_size)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * noise
        return noise * np.float32(0.1 if path[-1].key == "embedding" else leaf.shape[-2] ** -0.5)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Experiment(workdir, config, 7, "last", tokenizer, model, params)


def adapted(experiment: Experiment, **changes: Any) -> Experiment:
    """The model with random updates to it; `changes` are settings of `lora`."""
    values = experiment.config.to_config_dict()
    values.update_from_flattened_dict(changes)
    config = Config.build(values)
    adapters = init_adapters(experiment.params, config.lora, jax.random.PRNGKey(1))
    rng = np.random.default_rng(0)
    noisy = [
        np.asarray(x + 0.05 * rng.standard_normal(x.shape), np.float32) for x in jax.tree_util.tree_leaves(adapters)
    ]
    adapters = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(adapters), noisy)
    both = Adapted(experiment.params, adapters, config.lora.scale)
    return dataclasses.replace(experiment, config=config, params=merged(both), adapted=both)


def logits_of(experiment: Experiment, ids: list[int]) -> np.ndarray:
    """Float32 logits [T, V] of our model."""
    params = jax.tree_util.tree_map(jnp.asarray, experiment.params)
    result: Any = experiment.model.apply({"params": params}, jnp.asarray(ids)[None])
    return np.asarray(result[0][0])


def some_ids(experiment: Experiment, length: int = 40) -> list[int]:
    """Ids that are no special tokens, the same in every environment."""
    return np.random.default_rng(1).integers(4, experiment.tokenizer.vocab_size, length).tolist()


@functools.cache
def hard_texts(count: int = 10_000) -> list[str]:
    """Texts of every script, emoji, control characters, runs of spaces, special tokens written out, U+2581."""
    rng = random.Random(0)
    known = [i for i in range(1, 0x32000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]

    def script() -> str:
        start = rng.randrange(len(known))
        return "".join(chr(i) for i in rng.choices(known[start : start + 60], k=rng.randint(1, 12)))

    def words() -> str:
        text = rng.choice(TEXT)
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 30)]

    makers = (
        script,
        words,
        words,
        lambda: rng.choice(EMOJI) * rng.randint(1, 3),
        lambda: "".join(chr(rng.choice([*range(32), *range(127, 160)])) for _ in range(rng.randint(1, 4))),
        lambda: rng.choice(" \n\t\r\u00a0\u3000") * rng.randint(1, 20),
        lambda: rng.choice(SPECIAL_TEXTS),
        lambda: "\u2581" * rng.randint(1, 3),
        lambda: str(rng.randrange(10**9)),
        lambda: rng.choice("aeiouAn") + chr(rng.randint(0x300, 0x36F)),
        lambda: rng.choice(["don't", "WE'LL", "it's", "...", "?!", "--", "a,b;c", "e.g."]),
    )
    texts = ["", " ", "\u2581", "\n", *(chr(i) for i in range(128))]
    while len(texts) < count:
        texts.append("".join(rng.choice(makers)() for _ in range(rng.randint(1, 6))))
    return texts


def byte_level_tokenizer(kind: str = "gpt-2", vocab_size: int = 400) -> Any:
    """A byte-level tokenizer of the `tokenizers` library as GPT-2, SmolLM2 and Qwen have it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + words)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = {
        "gpt-2": whole,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]),
        "qwen2": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[kind]
    if kind == "qwen2":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    library.train_from_iterator(TEXT * 5, trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    library.add_tokens(["<think>"])
    return library


NEVER = (0, 1, 2, 3)  # the special tokens of our tokenizer, which no greedy text below takes


def greedy_ids(experiment: Experiment, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens after `ids`, one after another, each by a whole pass of our model."""
    model, length = experiment.model, len(ids)
    forward = jax.jit(lambda params, tokens, at: model.apply({"params": params}, tokens, logits_at=at)[0][0, 0])
    tokens = np.zeros((1, length + count), np.int32)
    tokens[0, :length] = ids
    for place in range(length, length + count):
        logits = np.array(forward(experiment.params, tokens, place - 1))
        logits[list(NEVER)] = -np.inf
        tokens[0, place] = logits.argmax()
    return tokens[0, length:].tolist()


# Versions of transformers that can be asked, and what goes before the rest of the path.
TRANSFORMERS = {"4.57": str(Path(sys.prefix) / "transformers4"), "5": ""}


def ask_transformers(version: str, requests: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The `version`, and the `answers` to the requests (see `tests/interop/transformers_side.py`), by a process of its
    own; files are written in `folder`."""
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(Path(__file__).parent / "interop" / "transformers_side.py")]
    path = filter(None, [TRANSFORMERS[version], os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    command += [str(folder / "requests.json"), str(folder / "answers.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "answers.json").read_text())
    assert result["version"].startswith(version)
    return result
