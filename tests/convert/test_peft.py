"""An adapter as PEFT has it: names, shapes and, by its own formula, the same weights as ours merged."""

import json

import numpy as np
import pytest
from interchange import ADAPTERS, adapted

from tale_jax.convert.formats import export_model
from tale_jax.convert.huggingface import export_huggingface
from tale_jax.convert.safetensors_files import open_safetensors, read_header
from tale_jax.runs.experiment import open_experiment


def adapted_experiment(trained, cpu, **changes):
    return adapted(open_experiment(trained, cpu), **changes)


def peft_merged(base, settings, tensors, name):
    """The weight [out, in] of a module of theirs with its adapter, as PEFT's source computes it."""
    weight, module = base.read(name), f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in tensors.shapes:
        return weight
    a, b = (tensors.read(f"{module}.lora_{letter}.weight") for letter in "AB")
    assert a.shape == (settings["r"], weight.shape[1]) and b.shape == (weight.shape[0], settings["r"])
    assert not settings["use_rslora"]  # which llama.cpp takes no notice of
    scale = settings["lora_alpha"] / settings["r"]
    weight = weight + scale * b @ a
    if not settings["use_dora"]:
        return weight
    return tensors.read(f"{module}.lora_magnitude_vector")[:, None] * weight / np.linalg.norm(weight, axis=1)[:, None]


@pytest.mark.parametrize("variant", ADAPTERS)
def test_an_adapter_on_the_exported_base_is_the_merged_model(trained, tmp_path, cpu, variant):
    experiment = adapted_experiment(trained, cpu, **ADAPTERS[variant])
    export_model(experiment, "peft", tmp_path / "adapter")
    export_huggingface(open_experiment(trained, cpu), tmp_path / "base")
    export_huggingface(experiment, tmp_path / "merged")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "model.safetensors")
    base, adapter, wanted = (open_safetensors(tmp_path / name) for name in ("base", "adapter", "merged"))
    named = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.shapes}
    assert sorted(named) == settings["target_modules"] and settings["peft_type"] == "LORA"
    assert settings["lora_dropout"] == experiment.config.lora.dropout
    for name in wanted.shapes:
        np.testing.assert_allclose(peft_merged(base, settings, adapter, name), wanted.read(name), atol=1e-5)


def test_what_cannot_be_an_adapter(trained, tmp_path, cpu):
    experiment = open_experiment(trained, cpu)
    with pytest.raises(ValueError, match=r"--to=peft needs adapters, and workdir=.* all weights; use --to=huggingface"):
        export_model(experiment, "peft", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    adapted = adapted_experiment(trained, cpu, **ADAPTERS["lora"])
    with pytest.raises(ValueError, match=r"--dtype=q8_0 must be one of float32, float16, bfloat16 for peft"):
        export_model(adapted, "peft", tmp_path / "x", "q8_0")
    export_model(adapted, "peft", tmp_path / "x", "bfloat16")
    assert {t.dtype for t in read_header(tmp_path / "x" / "adapter_model.safetensors").values()} == {"BF16"}
