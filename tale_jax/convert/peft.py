"""Out to an adapter for PEFT, beside the base that `--to=huggingface` writes of the base's workdir.

    export_peft(experiment, Path("adapter"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")

Ours read x [in] as x A B, with A [in, r] and B [r, out]; theirs are `lora_A` [r, in] and `lora_B` [out, r], named by
the module of the base. Of DoRA ours keep a gain for each column of a matrix, theirs the size of the column. What is
folded into the weights of a base, the scale of its embeddings, touches no matrix that has an update.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tale_jax.convert.dtypes import DTYPES, cast
from tale_jax.convert.safetensors_files import write_safetensors
from tale_jax.convert.weights import WEIGHTS
from tale_jax.model.adapters import Adapted, column_ratio
from tale_jax.runs.experiment import Experiment
from tale_jax.utils.paths import printable_path

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(experiment: Experiment, out: Path, dtype: str = "float32") -> None:
    """Writes the folder. Raises ValueError, in one line, for a run that has no adapters."""
    if experiment.adapted is None:
        raise ValueError(
            f"--to=peft needs adapters, and workdir={printable_path(experiment.workdir)} has trained all weights; use "
            "--to=huggingface"
        )
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} must be one of {', '.join(DTYPES)} for peft; q8_0 is for gguf")
    out.mkdir()
    (out / SETTINGS).write_text(json.dumps(peft_config(experiment), indent=2) + "\n", encoding="utf-8")
    tensors = peft_tensors(experiment.adapted)
    write_safetensors(out / TENSORS, {name: cast(name, array, dtype) for name, array in tensors})


def peft_config(experiment: Experiment) -> dict[str, Any]:
    """The content of adapter_config.json."""
    lora = experiment.config.lora
    modules = sorted({_module(path).rpartition(".")[2] for path in WEIGHTS if path[-2:-1] and path[-2] in lora.chosen})
    return {
        "base_model_name_or_path": experiment.config.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.scale * lora.rank,  # as plain LoRA has it: not every reader knows of rsLoRA
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": False,
    }


def peft_tensors(adapted: Adapted) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Names and float32 arrays as PEFT has them, layer by layer."""
    blocks = adapted.base["blocks"]
    for path in WEIGHTS:
        update = adapted.adapters["blocks"].get(path[1], {}).get(path[2]) if len(path) == 4 else None
        if update is None:
            continue
        a, b = (np.asarray(update[name], np.float32) for name in "ab")
        sizes = None
        if "gain" in update:
            kernel = np.asarray(blocks[path[1]][path[2]]["kernel"], np.float32)
            ratio = np.asarray(column_ratio(jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b), adapted.scale))
            sizes = np.asarray(update["gain"]) * ratio * np.linalg.norm(kernel + adapted.scale * a @ b, axis=-2)
        for layer in range(a.shape[0]):
            name = f"base_model.model.{_module(path).format(layer)}"
            yield f"{name}.lora_A.weight", np.ascontiguousarray(a[layer].T)
            yield f"{name}.lora_B.weight", np.ascontiguousarray(b[layer].T)
            if sizes is not None:
                yield f"{name}.lora_magnitude_vector", sizes[layer].astype(np.float32)


def _module(path: tuple[str, ...]) -> str:
    return WEIGHTS[path].removesuffix(".weight")
