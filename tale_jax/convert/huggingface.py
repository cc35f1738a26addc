"""Out to a Hugging Face folder that `transformers` opens without remote code, and in from one.

    export_huggingface(experiment, Path("my-model"), "float32")
    import_huggingface(Path("SmolLM2-135M"), Path("experiments/smollm2"))

Out: Llama, or Qwen3 where queries and keys are normalised, in `config.json`, `generation_config.json`,
`model.safetensors`, `tokenizer.json` and `tokenizer_config.json`. transformers 4 reads `rope_theta` and `rope_scaling`,
transformers 5 `rope_parameters`: both are written. Dropout and `mask_documents` are of training, and need no place.

In: both families, in one file or in shards, with a head of their own or tied, float32, float16 or bfloat16. What our
model has no place for is refused by its name. The result is a workdir like any other, at step 0.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tale_jax.config import Config, ModelConfig
from tale_jax.convert.dtypes import DTYPES, cast
from tale_jax.convert.safetensors_files import MAX_JSON_BYTES, Tensors, open_safetensors, write_safetensors
from tale_jax.convert.tokenizer_json import huggingface_tokenizer, tokenizer_json
from tale_jax.convert.weights import huggingface_weights, our_weights, places
from tale_jax.data.chat_template import TEMPLATE_FILE, read_template
from tale_jax.data.json_tokenizer import SETTINGS_FILE, JsonTokenizer, pack
from tale_jax.data.tokenizer import JSON_FILE, MODEL_FILE, SentencePieceTokenizer, Tokenizer
from tale_jax.model.attention import FAST_TURNS, SLOW_TURNS
from tale_jax.model.transformer import Transformer
from tale_jax.runs.experiment import Experiment, run_facts
from tale_jax.training.checkpoint import save_params
from tale_jax.utils.files import check_length, json_object

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a config.json of theirs may say and ours has no place for: field → the values that change nothing.
ONLY = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}
PADDED_TO, MAX_PADDING = 64, 0.02  # rows of an embedding: a multiple of this, and the share of them without a token


# Out.


def export_huggingface(experiment: Experiment, out: Path, dtype: str = "float32") -> None:
    """Writes a folder for `transformers`. Raises ValueError, in one line, for what cannot be written."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} must be one of {', '.join(DTYPES)} for huggingface; q8_0 is for gguf")
    specification, settings = huggingface_tokenizer(experiment.tokenizer)
    config, template = experiment.config, chat_template(experiment)
    settings |= {"model_max_length": config.model.seq_len}
    if template:
        settings |= {"chat_template": template, "split_special_tokens": False}
    out.mkdir()
    _write_json(out / "config.json", huggingface_config(experiment, dtype))
    _write_json(out / "generation_config.json", _generation_config(experiment))
    (out / JSON_FILE).write_text(specification, encoding="utf-8")
    _write_json(out / SETTINGS_FILE, settings)
    weights = huggingface_weights(experiment.params, config.model)
    write_safetensors(out / "model.safetensors", {name: cast(name, array, dtype) for name, array in weights})


def huggingface_config(experiment: Experiment, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    c, tokenizer = experiment.config.model, experiment.tokenizer
    family = "qwen3" if c.qk_norm else "llama"
    scaling = {}
    if c.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_scaling,
            "low_freq_factor": SLOW_TURNS,
            "high_freq_factor": FAST_TURNS,
            "original_max_position_embeddings": c.rope_original_len,
        }
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _or_none(tokenizer.bos_id),
        "dtype": dtype,
        "eos_token_id": _or_none(tokenizer.eos_id),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.embed_dim,
        "initializer_range": 0.02,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": c.seq_len,
        **({"mlp_bias": False} if family == "llama" else {"use_sliding_window": False}),
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "pad_token_id": _or_none(tokenizer.pad_id),
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base} | scaling,
        "rope_scaling": scaling or None,
        "rope_theta": c.rope_base,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": experiment.config.tokenizer.vocab_size,
    }


def chat_template(experiment: Experiment) -> str:
    """The Jinja template that the workdir keeps for chats, "" where it has none."""
    return read_template(experiment.workdir, experiment.tokenizer)


def _generation_config(experiment: Experiment) -> dict[str, Any]:
    """How text is drawn by default: as this run drew its samples."""
    temperature, tokenizer = experiment.config.sample.temperature, experiment.tokenizer
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_id") for mark in ("bos", "eos", "pad")}
    return {mark: index for mark, index in marks.items() if index >= 0} | drawn


def _or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# In.


def import_huggingface(path: Path, workdir: Path) -> None:
    """Makes a workdir of a Hugging Face folder. Raises ValueError, in one line, for what cannot be read."""
    config, params, files = read_huggingface(path)
    (workdir / "tokenizer").mkdir(parents=True)
    files.save(workdir / "tokenizer")
    if (path / TEMPLATE_FILE).is_file():
        check_length(path / TEMPLATE_FILE, MAX_JSON_BYTES)
        shutil.copy(path / TEMPLATE_FILE, workdir / "tokenizer" / TEMPLATE_FILE)
    save_params(workdir, 0, params, run_facts(config, files, {}, "float32"))
    config.save(workdir)


def read_huggingface(path: Path) -> tuple[Config, Any, Tokenizer]:
    """The config, the weights and the tokenizer of a Hugging Face folder, none of which is written anywhere."""
    theirs = read_json(path / "config.json")
    tensors = open_safetensors(path)
    tokenizer = _read_tokenizer(path, theirs)
    config = our_config(theirs, path)
    shapes = _abstract_params(config)
    _check_tensors(tensors, shapes, config, path)
    _check_vocabulary(tokenizer, config.tokenizer.vocab_size, path)
    return config, our_weights(shapes, tensors.read), tokenizer


def our_config(theirs: Mapping[str, Any], path: Path) -> Config:
    """Our config of a config.json of theirs, by whose name unsupported fields are refused."""
    name, family = path / "config.json", theirs.get("model_type")
    if family not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(f"{name}: model_type={_said(family)} must be {known}; bring a model of one of these")
    for field, allowed in ONLY.items():
        if theirs.get(field) not in allowed:
            rule = f"must be {_said(allowed[0])}, and no other is supported"
            raise ValueError(f"{name}: {field}={_said(theirs[field])} {rule}; bring another model")
    layers = theirs.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ValueError(f"{name}: layer_types must all be full_attention; bring a model without sliding windows")
    heads = _number(theirs, "num_attention_heads", name)
    default_head_dim = 128 if family == "qwen3" else 0
    base, scaling, original_len = _rope(theirs, name)
    model = dataclasses.asdict(ModelConfig()) | {
        "num_layers": _number(theirs, "num_hidden_layers", name),
        "embed_dim": _number(theirs, "hidden_size", name),
        "num_heads": heads,
        "num_kv_heads": _number(theirs, "num_key_value_heads", name, heads),
        "head_dim": _number(theirs, "head_dim", name, default_head_dim),
        "mlp_dim": _number(theirs, "intermediate_size", name),
        "seq_len": _number(theirs, "max_position_embeddings", name, 2048),
        "norm_eps": float(_number(theirs, "rms_norm_eps", name, 1e-6, float)),
        "rope_base": base,
        "rope_scaling": scaling,
        "rope_original_len": original_len,
        "qk_norm": family == "qwen3",
        "tie_embeddings": bool(theirs.get("tie_word_embeddings", False)),
        "scale_embeddings": False,
        "zero_init_outputs": False,
    }
    values: Any = dataclasses.asdict(Config())
    source = path.absolute()
    values["corpus"] |= {"name": "files", "path": str(source)}  # where it comes from: its own text is not known
    values["tokenizer"] |= {"vocab_size": _number(theirs, "vocab_size", name), "path": str(source / JSON_FILE)}
    try:
        return Config.build(values | {"model": model})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _rope(theirs: Mapping[str, Any], name: Path) -> tuple[float, float, int]:
    """Base, factor of Llama 3's scaling (0: none) and the context before it, as transformers 4 or 5 wrote them."""
    parameters = _object(theirs, "rope_parameters", name)
    scaling = _object(theirs, "rope_scaling", name) or parameters
    base = parameters.get("rope_theta") or scaling.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    if not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ValueError(f"{name}: rope_theta={_said(base)} must be a number above 0; copy the file again")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(base), 0.0, ModelConfig().rope_original_len
    if kind != "llama3":
        raise ValueError(f"{name}: rope scaling of type {_said(kind)} must be default or llama3; bring another model")
    for field, wanted in (("low_freq_factor", SLOW_TURNS), ("high_freq_factor", FAST_TURNS)):
        if scaling.get(field, wanted) != wanted:
            raise ValueError(
                f"{name}: rope scaling with {field}={_said(scaling[field])} must have {wanted}; bring another model"
            )
    factor = _number(scaling, "factor", name, kind=float)
    return float(base), float(factor), _number(scaling, "original_max_position_embeddings", name)


def _number(values: Mapping[str, Any], field: str, name: Path, default: Any = None, kind: type = int) -> Any:
    value = values.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ValueError(f"{name}: {field}={_said(value)} must be a number; copy the file again")
    return value


def _object(values: Mapping[str, Any], field: str, name: Path) -> Mapping[str, Any]:
    value = values.get(field) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {field}={_said(value)} must be an object; copy the file again")
    return value


def _said(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of their folder. Raises ValueError, in one line, when it is missing or none."""
    if not path.is_file():
        raise ValueError(f"{path.parent} must be a Hugging Face folder (no {path.name} there); give --path=FOLDER")
    check_length(path, MAX_JSON_BYTES)
    return json_object(path.read_bytes(), path, "copy it again")


def _read_tokenizer(path: Path, theirs: Mapping[str, Any]) -> JsonTokenizer:
    """The tokenizer of the folder, with the marks of documents that its settings or config.json name."""
    beside = path / SETTINGS_FILE
    settings = read_json(beside) if beside.is_file() else {}
    if (path / JSON_FILE).is_file():
        name = path / JSON_FILE
        check_length(name, MAX_JSON_BYTES)
        specification = name.read_bytes()
    elif (path / MODEL_FILE).is_file():
        name = path / MODEL_FILE
        check_length(name, MAX_JSON_BYTES)
        ours = SentencePieceTokenizer(name.read_bytes(), str(name))
        specification = tokenizer_json(ours.model, ours.bos_id, prefix=ours.adds_space, name=str(name)).encode()
    else:
        raise ValueError(f"{path} must hold a tokenizer ({JSON_FILE} or {MODEL_FILE}); add that of the model")
    tokenizer = JsonTokenizer(pack(specification, settings, str(name)), str(name))
    for mark in ("bos", "eos"):
        if getattr(tokenizer, f"{mark}_id") < 0:
            settings |= {f"{mark}_token": _mark_of(mark, theirs, tokenizer, name)}
    return JsonTokenizer(pack(specification, settings, str(name)), str(name))


def _mark_of(mark: str, theirs: Mapping[str, Any], tokenizer: JsonTokenizer, name: Path) -> str:
    """The special token that config.json names as `mark`; the end of a document begins the next where none does."""
    for field in (f"{mark}_token_id", "eos_token_id"):
        index = theirs.get(field)
        index = index[0] if isinstance(index, list) and index else index
        if type(index) is int and (token := tokenizer.library.id_to_token(index) if index >= 0 else None):
            return token
    if tokenizer.eos_id >= 0:
        return tokenizer.library.id_to_token(tokenizer.eos_id)
    raise ValueError(f"{name} must have a token for {mark}; name it as {mark}_token in {SETTINGS_FILE}")


def _abstract_params(config: Config) -> Any:
    model = Transformer(config.model, config.tokenizer.vocab_size)
    return jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]


def _check_tensors(tensors: Tensors, shapes: Any, config: Config, path: Path) -> None:
    """Raises ValueError, in one line, for the first tensor that is missing, of another shape, or has no place."""
    expected = {name: shape for name, _, shape in places(shapes)}
    for name, shape in expected.items():
        if name not in tensors.shapes:
            raise ValueError(f"{path} must hold {name}, as its config.json has it; copy the folder again")
        if tensors.shapes[name] != shape:
            found = list(tensors.shapes[name])
            raise ValueError(
                f"{path}: {name} has the shape {found} and must have {list(shape)}, by its config.json; copy the "
                "folder again"
            )
    ignored = {"lm_head.weight"} if config.model.tie_embeddings else set()
    surplus = [name for name in tensors.shapes if name not in {*expected, *ignored} and "rotary_emb" not in name]
    if surplus:
        raise ValueError(f"{path}: {_said(min(surplus))} has no place in our model; bring a plain Llama or Qwen3")


def _check_vocabulary(tokenizer: Tokenizer, rows: int, path: Path) -> None:
    """An embedding has a row for each token; some are padded to a multiple of 64 or more."""
    padding = rows - tokenizer.vocab_size
    if padding and (padding < 0 or rows % PADDED_TO or padding > max(PADDED_TO, MAX_PADDING * rows)):
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and must have the {rows} of the embedding; "
            "it belongs to another model; copy the one of this model"
        )
