"""Out to Hugging Face and in again: agreement with transformers, bit-equal round trips, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import build_config
from interchange import (
    VARIANTS,
    byte_level_tokenizer,
    greedy_ids,
    logits_of,
    make_experiment,
    our_tokenizer,
    some_ids,
)

from tale_jax.config import Config
from tale_jax.convert.formats import export_model, import_model
from tale_jax.convert.huggingface import read_huggingface
from tale_jax.convert.safetensors_files import open_safetensors, write_safetensors
from tale_jax.convert.weights import huggingface_weights
from tale_jax.data.json_tokenizer import JsonTokenizer, pack
from tale_jax.data.prepare import prepare
from tale_jax.model.transformer import Transformer
from tale_jax.runs.experiment import Experiment, open_experiment

pytest.importorskip("tokenizers", reason="needs the convert extra")
pytest.importorskip("safetensors", reason="needs the convert extra")
AGREEMENT = json.loads((Path(__file__).parent / "agreement.json").read_text())


def read_back(path: Path) -> Experiment:
    config, params, tokenizer = read_huggingface(path)
    model = Transformer(config.model, config.tokenizer.vocab_size)
    return Experiment(path, config, 0, "last", tokenizer, model, params)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_that_transformers_computes_of_the_export(name, tmp_path):
    """What transformers 4.57 and 5 computed once in the environment of tests/interop, before any of this was read."""
    experiment, stored = make_experiment(tmp_path, **VARIANTS[name]), AGREEMENT[name]
    ids = some_ids(experiment)
    assert ids == stored["ids"]
    ours = logits_of(experiment, ids)[-1]
    np.testing.assert_allclose(ours[: len(stored["logits"])], stored["logits"], atol=2e-5)
    assert greedy_ids(experiment, ids, 8) == stored["greedy"][:8]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_export_read_back_computes_the_same(name, tmp_path):
    experiment = make_experiment(tmp_path, **VARIANTS[name])
    export_model(experiment, "huggingface", tmp_path / "out")
    back = read_back(tmp_path / "out")
    assert not back.config.model.scale_embeddings and back.config.model.qk_norm == experiment.config.model.qk_norm
    ids = some_ids(experiment)
    np.testing.assert_allclose(logits_of(back, ids), logits_of(experiment, ids), atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_export_of_an_import_is_bit_equal(name, tmp_path, cpu):
    export_model(make_experiment(tmp_path, **VARIANTS[name]), "huggingface", tmp_path / "out")
    import_model("huggingface", tmp_path / "out", tmp_path / "workdir")
    imported = open_experiment(tmp_path / "workdir", cpu)
    export_model(imported, "huggingface", tmp_path / "again")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in written:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_import_of_an_export_is_bit_equal(tmp_path):
    """Where nothing has to be folded in."""
    experiment = make_experiment(tmp_path, **VARIANTS["llama untied"])
    export_model(experiment, "huggingface", tmp_path / "out")
    back = read_back(tmp_path / "out")
    jax.tree_util.tree_map(np.testing.assert_array_equal, back.params, dict(experiment.params))


def test_shards_and_half_precision(tmp_path):
    experiment = make_experiment(tmp_path, **VARIANTS["llama grouped"])
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 1e-2)):
        out = tmp_path / dtype
        export_model(experiment, "huggingface", out, dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        tensors = open_safetensors(out)
        half = sorted(tensors.shapes)[: len(tensors.shapes) // 2]
        parts = {"a.safetensors": half, "b.safetensors": sorted(set(tensors.shapes) - set(half))}
        for shard, names in parts.items():
            write_safetensors(out / shard, {name: tensors.read(name) for name in names})
        index = {"weight_map": {name: shard for shard, names in parts.items() for name in names}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        (out / "model.safetensors").rename(tmp_path / "model.safetensors")
        back, tensors = read_back(out), open_safetensors(tmp_path)
        for name, array in huggingface_weights(experiment.params, experiment.config.model):
            np.testing.assert_allclose(tensors.read(name), array, rtol=tolerance, atol=tolerance)
            np.testing.assert_array_equal(
                tensors.read(name), dict(huggingface_weights(back.params, back.config.model))[name]
            )


def test_a_weight_that_float16_cannot_hold(tmp_path):
    experiment = make_experiment(tmp_path, **VARIANTS["llama"])
    experiment.params["embedding"][5, 5] = 1e5
    with pytest.raises(ValueError, match=r"dtype=float16 must hold model\.embed_tokens\.weight, .* try bfloat16"):
        export_model(experiment, "huggingface", tmp_path / "out", "float16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"--dtype=q8_0 must be one of float32, float16, bfloat16 for huggingface"):
        export_model(experiment, "huggingface", tmp_path / "out", "q8_0")
    export_model(experiment, "huggingface", tmp_path / "out", "bfloat16")
    assert open_safetensors(tmp_path / "out").read("model.embed_tokens.weight").max() > 9e4


def test_a_byte_level_tokenizer_goes_out_and_comes_in_as_it_is(tmp_path):
    library = byte_level_tokenizer("smollm")
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_start|>", "chat_template": "{{ messages }}"}
    tokenizer = JsonTokenizer(pack(library.to_str(), settings))
    experiment = make_experiment(tmp_path, tokenizer, **VARIANTS["llama"])
    export_model(experiment, "huggingface", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == library.to_str()
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages }}" and not written["split_special_tokens"]
    back = read_back(tmp_path / "out")
    assert (back.tokenizer.bos_id, back.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def exported(tmp_path: Path, **changes: Any) -> Path:
    export_model(make_experiment(tmp_path, **changes), "huggingface", tmp_path / "out")
    return tmp_path / "out"


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "REMOVED"}))


def test_config_json_of_transformers_4_and_of_5(tmp_path):
    folder = exported(tmp_path, **VARIANTS["llama scaled positions"])
    whole = (folder / "config.json").read_text()
    wanted = read_huggingface(folder)[0].model
    assert (wanted.rope_scaling, wanted.rope_original_len, wanted.rope_base) == (8.0, 32, 10_000.0)
    edit(folder / "config.json", rope_parameters="REMOVED")  # as 4 writes it
    assert read_huggingface(folder)[0].model == wanted
    (folder / "config.json").write_text(whole)
    edit(folder / "config.json", rope_scaling="REMOVED", rope_theta="REMOVED", torch_dtype="REMOVED")  # as 5 does
    assert read_huggingface(folder)[0].model == wanted
    edit(folder / "config.json", head_dim="REMOVED", num_key_value_heads="REMOVED", rope_parameters="REMOVED")
    model = read_huggingface(folder)[0].model
    assert (model.head_dim, model.num_kv_heads, model.rope_scaling) == (16, 4, 0.0)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "gpt2"}, 'model_type="gpt2" must be llama or qwen3'),
        ({"model_type": "REMOVED"}, "model_type=null must be llama or qwen3"),
        ({"attention_bias": True}, "attention_bias=true must be false, and no other is supported"),
        ({"mlp_bias": True}, "mlp_bias=true must be false"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" must be "silu"'),
        ({"use_sliding_window": True}, "use_sliding_window=true must be false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be full_attention"),
        ({"layer_types": 0.5}, "layer_types must all be full_attention"),
        ({"rope_scaling": 1e308}, "rope_scaling=1e+308 must be an object"),
        ({"rope_parameters": ["a"]}, 'rope_parameters=["a"] must be an object'),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope scaling of type "linear" must be default or llama3',
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            'rope scaling of type "yarn" must be default or llama3',
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor=null must be a number"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor=2.0 must have 1.0",
        ),
        ({"rope_theta": "10", "rope_parameters": {}}, 'rope_theta="10" must be a number above 0'),
        ({"hidden_size": "64"}, 'hidden_size="64" must be a number'),
        ({"hidden_size": None}, "hidden_size=null must be a number"),
        ({"hidden_size": 1 << 40}, "model.embed_dim="),
        ({"num_hidden_layers": 0}, "model.num_layers=0 must be positive"),
        ({"num_attention_heads": 5}, "model.num_kv_heads=4"),
        ({"num_hidden_layers": 3}, "must hold model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, '"model.layers.1.input_layernorm.weight" has no place in our model'),
        ({"intermediate_size": 100}, "has the shape [96, 64] and must have [100, 64]"),
        ({"tie_word_embeddings": False}, "must hold lm_head.weight"),
        ({"vocab_size": 320}, "has the shape [360, 64] and must have [320, 64]"),
        ({"model_type": "qwen3"}, "must hold model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_a_config_json_that_is_not_supported(tmp_path, changes, part):
    folder = exported(tmp_path, **VARIANTS["llama"])
    whole = (folder / "config.json").read_text()
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=r"out") as caught:
        import_model("huggingface", folder, tmp_path / "workdir")
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "config.json").write_text(whole)  # copied again, or of another model
    assert read_huggingface(folder)[0].model.num_layers == 2


def padded(folder: Path, rows: int) -> None:
    """The embedding with more or fewer rows."""
    tensors = open_safetensors(folder)
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    arrays["model.embed_tokens.weight"] = np.resize(arrays["model.embed_tokens.weight"], (rows, 64))
    write_safetensors(folder / "model.safetensors", arrays)
    edit(folder / "config.json", vocab_size=rows)


@pytest.mark.parametrize(("rows", "fits"), [(359, False), (361, False), (384, True), (448, False), (320, False)])
def test_a_tokenizer_whose_size_is_not_that_of_the_embedding(tmp_path, rows, fits):
    folder = exported(tmp_path, **VARIANTS["llama"])
    padded(folder, rows)
    if fits:  # padded to a multiple of 64
        assert read_huggingface(folder)[0].tokenizer.vocab_size == rows
    else:
        with pytest.raises(ValueError, match=f"the tokenizer has 360 tokens and must have the {rows}"):
            read_huggingface(folder)
        padded(folder, 360)
        assert read_huggingface(folder)[0].tokenizer.vocab_size == 360


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("config.json", "must be a Hugging Face folder (no config.json there)"),
        ("model.safetensors", "must hold model.safetensors, or model.safetensors.index.json"),
        ("tokenizer.json", "must hold a tokenizer (tokenizer.json or tokenizer.model)"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path, missing, part):
    folder = exported(tmp_path)
    whole = {name: (folder / name).read_bytes() for name in (missing, "config.json")}
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"out must") as caught:
        import_model("huggingface", folder, tmp_path / "workdir")
    assert part in str(caught.value)
    for content in ("[]", "{"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json must be .* copy it again"):
            import_model("huggingface", folder, tmp_path / "workdir")
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    assert read_huggingface(folder)[0].model.num_layers == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_file_that_claims_a_length_no_memory_holds(tmp_path, name):
    folder = exported(tmp_path)
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(ValueError, match=rf"{name} must have at most 268,435,456 bytes, and has .*; restore it"):
        import_model("huggingface", folder, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_marks_are_found_where_the_tokenizer_does_not_name_them(tmp_path):
    folder = exported(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = read_huggingface(folder)[2]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)  # as config.json has them
    edit(folder / "config.json", bos_token_id=None, eos_token_id=[2, 3])
    tokenizer = read_huggingface(folder)[2]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)
    edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"must have a token for bos; name it as bos_token in tokenizer_config\.json"):
        read_huggingface(folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    assert read_huggingface(folder)[2].eos_id == 2


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path):
    folder = exported(tmp_path, **VARIANTS["llama"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(our_tokenizer().model)
    tokenizer = read_huggingface(folder)[2]
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.vocab_size == 360
    text = "Once upon a time, \u2581 ½"
    assert tokenizer.encode(text).tolist() == our_tokenizer().encode(text).tolist()


def test_a_workdir_made_of_a_folder_is_one_like_any_other(tmp_path, cpu):
    folder = exported(tmp_path, **VARIANTS["llama"])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    import_model("huggingface", folder, tmp_path / "new" / "workdir")
    shutil.rmtree(folder)
    experiment = open_experiment(tmp_path / "new" / "workdir", cpu)
    assert experiment.step == 0 and Config.load(tmp_path / "new" / "workdir") == experiment.config
    assert (tmp_path / "new" / "workdir" / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(
        ValueError, match=r"--workdir=.* must not exist yet, so that nothing is lost; remove it, or give"
    ):
        import_model("huggingface", tmp_path, tmp_path / "new" / "workdir")
    with pytest.raises(ValueError, match=r"--path=.* must be a folder, and does not exist; check its path"):
        import_model("huggingface", tmp_path / "gone", tmp_path / "other")


def test_weights_that_have_no_name_elsewhere(tmp_path):
    experiment = make_experiment(tmp_path)
    odd = dataclasses.replace(experiment, params={**experiment.params, "lora": {"a": np.zeros((2, 2), np.float32)}})
    with pytest.raises(ValueError, match=r"lora/a .* merge them into the model"):
        export_model(odd, "huggingface", tmp_path / "out")
    export_model(experiment, "huggingface", tmp_path / "out")


def test_a_workdir_made_of_a_folder_prepares_other_text(tmp_path):
    import_model("huggingface", exported(tmp_path, **VARIANTS["llama"]), tmp_path / "workdir")
    (tmp_path / "tales.txt").write_text("\n\n".join(f"Once there was a fox named {n}." for n in range(400)))
    wanted = {"corpus.path": str(tmp_path / "tales.txt"), "corpus.name": "files", "model.seq_len": 32}
    small = build_config(**wanted | {"tokenizer.vocab_size": 300})
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=300 must be .*; try --config.tokenizer.vocab_size=360"):
        prepare(small, tmp_path / "workdir")
    prepared = prepare(build_config(**wanted | {"tokenizer.vocab_size": 360}), tmp_path / "workdir")
    assert isinstance(prepared.tokenizer, JsonTokenizer) and set(prepared.manifests) == {"train", "valid", "test"}
