"""Our adapters on the exported base, in PEFT and as a .gguf file in llama.cpp: the logits are those of ours, merged."""

import json

import numpy as np
import pytest
from interchange import (
    ADAPTERS,
    TRANSFORMERS,
    VARIANTS,
    adapted,
    ask_transformers,
    logits_of,
    make_experiment,
    some_ids,
)

from tale_jax.convert.formats import export_model
from tale_jax.convert.gguf import pairs_side_by_side
from tale_jax.convert.safetensors_files import open_safetensors

pytestmark = pytest.mark.interop
MODELS = ("qwen3", "llama grouped", "llama uneven")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For a model and a kind of adapter: the base, the base with the adapter, and the folders that both went out to."""
    made = {}
    for name in MODELS:
        base = make_experiment(tmp_path_factory.mktemp("base"), **VARIANTS[name])
        for kind, changes in ADAPTERS.items():
            folder = tmp_path_factory.mktemp("out")
            experiment = adapted(base, **changes)
            export_model(base, "huggingface", folder / "base")
            export_model(experiment, "peft", folder / "adapter")
            made[name, kind] = base, experiment, folder
    return made


@pytest.fixture(scope="module", params=TRANSFORMERS)
def answers(request, pairs, tmp_path_factory):
    pytest.importorskip("peft", reason="needs the interop extra: make test-interop")
    requests = [
        {"folder": str(folder / "base"), "adapter": str(folder / "adapter"), "ids": some_ids(base)}
        for base, _, folder in pairs.values()
    ]
    result = ask_transformers(request.param, requests, tmp_path_factory.mktemp("peft"))
    return result["version"], dict(zip(pairs, result["answers"], strict=True))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_logits_of_the_merged_model(pairs, answers, name, kind, table):
    base, experiment, _ = pairs[name, kind]
    version, found = answers
    ours, theirs = logits_of(experiment, some_ids(base)), np.array(found[name, kind]["logits"])
    difference, moved = abs(ours - theirs), abs(ours - logits_of(base, some_ids(base)))
    row = {"max": float(difference.max()), "mean": float(difference.mean()), "moved": float(moved.max())}
    table("adapters in PEFT", transformers=version, model=name, adapter=kind, **row)
    assert difference.max() < 1e-4 and moved.max() > 0.1


def write_gguf_adapter(path, experiment, folder):
    """What llama.cpp's convert_lora_to_gguf.py makes of our PEFT folder; it refuses DoRA."""
    import gguf

    c = experiment.config.model
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    tensors = open_safetensors(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if c.qk_norm else gguf.MODEL_ARCH.LLAMA, c.num_layers)
    writer = gguf.GGUFWriter(path, "qwen3" if c.qk_norm else "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
    for theirs in tensors.shapes:
        module, _, matrix = theirs.removeprefix("base_model.model.").rpartition(".lora_")
        array = np.ascontiguousarray(tensors.read(theirs))
        if matrix == "B.weight" and not c.qk_norm and module.endswith(("q_proj", "k_proj")):
            array = pairs_side_by_side(array, c.head_dim)  # the rows of the product are those of B
        name = names.get_name(module)
        writer.add_tensor(f"{name}.weight.lora_{matrix[0].lower()}", array, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits_of_the_merged_model(pairs, tmp_path, name, kind, table):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the interop extra: make test-interop")
    base, experiment, _ = pairs[name, kind]
    ids = some_ids(base)
    export_model(base, "gguf", tmp_path / "base.gguf")
    export_model(experiment, "peft", tmp_path / "adapter")
    write_gguf_adapter(tmp_path / "adapter.gguf", experiment, tmp_path / "adapter")
    options = {"n_ctx": 256, "logits_all": True, "verbose": False, "n_threads": 1, "type_k": 0, "type_v": 0}
    model = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "adapter.gguf"), **options)
    model.eval(ids)
    difference = abs(np.array(model.scores[: len(ids)]) - logits_of(experiment, ids))
    table("adapters in llama.cpp", model=name, adapter=kind, max=float(difference.max()), mean=float(difference.mean()))
    assert difference.max() < 1e-3
