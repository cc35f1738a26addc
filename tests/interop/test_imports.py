"""Models as people bring them, made by transformers: the same logits here, and an adapter of ours on them in PEFT.

The shapes are those of the published models, with fewer layers and tokens, so that they are made in seconds.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from interchange import (
    TRANSFORMERS,
    ask_transformers,
    byte_level_tokenizer,
    logits_of,
    make_experiment,
    our_tokenizer,
)

from configs import finetune
from tale_jax.config import Config
from tale_jax.convert.formats import export_model, import_base, import_model, with_base
from tale_jax.data.tales import grammar
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.train import train

pytestmark = pytest.mark.interop
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
STORIES = {"model_type": "llama", "hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6}
STORIES |= {"num_key_value_heads": 6, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
TINYLLAMA = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
TINYLLAMA |= {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6}
LLAMA32 = STORIES | {"tie_word_embeddings": False, "rope_theta": 5e5}
LLAMA32 |= {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
# Settings of config.json, the kind of tokenizer, the dtype, and the size of a file.
MODELS = {
    "SmolLM2-135M": (SMOLLM2, "smollm", "bfloat16", "5GB"),
    "stories15M": (STORIES, "", "float32", "5GB"),
    "TinyLlama-1.1B": (TINYLLAMA, "", "float16", "50MB"),
    "Qwen3-0.6B": (QWEN3, "qwen2", "bfloat16", "10MB"),
    "Llama 3.2's positions": (LLAMA32, "gpt-2", "float32", "1MB"),
}


def write_tokenizer(folder: Path, kind: str) -> int:
    """Writes tokenizer.json and tokenizer_config.json, and returns the number of tokens."""
    if not kind:  # SentencePiece
        export_model(make_experiment(folder.parent), "huggingface", folder)
        (folder / "model.safetensors").unlink()
        return our_tokenizer().vocab_size
    folder.mkdir()
    tokenizer = byte_level_tokenizer(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module", params=TRANSFORMERS)
def made(request, tmp_path_factory):
    """A version, and for each model its folder and what the version says of it."""
    top, requests = tmp_path_factory.mktemp("theirs"), {}
    for name, (settings, kind, dtype, shard) in MODELS.items():
        folder = top / name
        size = write_tokenizer(folder, kind)
        settings = settings | {"vocab_size": size, "num_hidden_layers": 2, "max_position_embeddings": 128}
        settings |= {"initializer_range": settings["hidden_size"] ** -0.5, "bos_token_id": 1, "eos_token_id": 2}
        ids = np.random.default_rng(1).integers(4, size, 60).tolist()
        requests[name] = {"folder": str(folder), "make": settings, "dtype": dtype, "shard": shard, "ids": ids}
    answers = ask_transformers(request.param, list(requests.values()), top)
    return request.param, {
        name: (Path(one["folder"]), one["ids"], found)
        for (name, one), found in zip(requests.items(), answers["answers"], strict=True)
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_elsewhere_has_the_same_logits_here(made, tmp_path, cpu, name, table):
    version, models = made
    folder, ids, found = models[name]
    import_model("huggingface", folder, tmp_path / "ours")
    experiment = open_experiment(tmp_path / "ours", cpu)
    assert len(list(folder.glob("*.safetensors"))) > 1 or MODELS[name][3] == "5GB"
    ours, theirs = logits_of(experiment, ids), np.array(found["logits"])
    difference = abs(ours - theirs)
    row = {"max": float(difference.max()), "mean": float(difference.mean()), "largest": float(abs(theirs).max())}
    table("imported logits", transformers=version, model=name, **row)
    assert difference.max() < 1e-4 and abs(theirs).max() > 0.5


def test_an_adapter_trained_here_on_their_model_is_theirs(made, tmp_path, cpu, table):
    """The way of a user: a folder from elsewhere, LoRA on own text, and PEFT on the same folder."""
    pytest.importorskip("peft", reason="needs the interop extra: make test-interop")
    version, models = made
    folder, ids, _ = models["SmolLM2-135M"]
    text = tmp_path / "new.txt"
    text.write_text("\n\n".join(grammar.tell(index, "train", 7).text for index in range(80)))
    values = finetune.get_config("lora")
    values.update_from_flattened_dict(
        {"base": str(folder), "corpus.path": str(text), "total_steps": 4, "batch_size": 2, "evaluate.max_windows": 2}
        | {"model.seq_len": 64, "sample.num_samples": 1, "sample.max_tokens": 4, "precision": "float32"}
        | {"lora.alpha": 64.0, "optimizer.learning_rate": 1e-2}
    )
    workdir = tmp_path / "run"
    config = with_base(Config.build(values), workdir, {"model.seq_len"})
    import_base(config, workdir)
    train(config, workdir, cpu)
    experiment = open_experiment(workdir, cpu)
    export_model(experiment, "peft", tmp_path / "adapter")
    request = {"folder": str(folder), "adapter": str(tmp_path / "adapter"), "ids": ids}
    [found] = ask_transformers(version, [request], tmp_path)["answers"]
    ours, base = logits_of(experiment, ids), np.array(models["SmolLM2-135M"][2]["logits"])
    difference, moved = abs(ours - np.array(found["logits"])), abs(ours - base)
    table("their model with our adapter, in PEFT", transformers=version, max=float(difference.max()))
    assert difference.max() < 1e-4 and moved.max() > 0.05
