"""The weights under the names that Hugging Face gives them, both ways.

Ours stack the layers and keep kernels as [in, out]; theirs are named layer by layer and are [out, in]. Everything else
is alike: rotary positions turn the same pairs of a head, norms and the gated MLP are the same. What their architectures
have no place for is folded in: embeddings that our model multiplies by sqrt(embed_dim) are written multiplied. Where
the head is the same table, its logits would grow by as much, so the scale of the last norm is divided by it.

    for name, array in huggingface_weights(params, config): …
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tale_jax.config import ModelConfig

# Our path → their name; ours are stacked where the name has a layer {}.
WEIGHTS = {
    ("embedding",): "model.embed_tokens.weight",
    ("blocks", "attention_norm", "scale"): "model.layers.{}.input_layernorm.weight",
    ("blocks", "attention", "query", "kernel"): "model.layers.{}.self_attn.q_proj.weight",
    ("blocks", "attention", "key", "kernel"): "model.layers.{}.self_attn.k_proj.weight",
    ("blocks", "attention", "value", "kernel"): "model.layers.{}.self_attn.v_proj.weight",
    ("blocks", "attention", "output", "kernel"): "model.layers.{}.self_attn.o_proj.weight",
    ("blocks", "attention", "query_norm", "scale"): "model.layers.{}.self_attn.q_norm.weight",
    ("blocks", "attention", "key_norm", "scale"): "model.layers.{}.self_attn.k_norm.weight",
    ("blocks", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
    ("blocks", "mlp", "gate", "kernel"): "model.layers.{}.mlp.gate_proj.weight",
    ("blocks", "mlp", "up", "kernel"): "model.layers.{}.mlp.up_proj.weight",
    ("blocks", "mlp", "down", "kernel"): "model.layers.{}.mlp.down_proj.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of theirs lies in our tree: `path`, and `layer` of a stacked array (None: not stacked)."""

    path: tuple[str, ...]
    layer: int | None

    @property
    def transposed(self) -> bool:
        return self.path[-1] in ("kernel", "head")


def places(params: Any) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """For each tensor of theirs its name, its place in our tree and its shape; `params` may be shapes alone."""
    for path, array in _leaves(params):
        name = WEIGHTS[path]
        layers = range(array.shape[0]) if "{}" in name else (None,)
        for layer in layers:
            place = Place(path, layer)
            shape = array.shape if layer is None else array.shape[1:]
            yield name.format(layer), place, shape[::-1] if place.transposed else shape


def huggingface_weights(params: Any, config: ModelConfig) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Names and float32 weights as Llama and Qwen3 have them, one tensor at a time, in the order of `WEIGHTS`."""
    arrays = {path: np.asarray(array) for path, array in _leaves(params)}
    for name, place, _ in places(params):
        array = arrays[place.path]
        if place.layer is not None:
            array = array[place.layer]
        if config.scale_embeddings:
            array = _fold_scale(array, place.path, config)
        yield name, np.ascontiguousarray(array.T if place.transposed else array)


def our_weights(abstract_params: Any, read: Callable[[str], Float[np.ndarray, "..."]]) -> Any:
    """Our tree, of the shapes in `abstract_params`, filled with what `read` gives for each name of theirs."""
    arrays = {path: np.empty(leaf.shape, np.float32) for path, leaf in _leaves(abstract_params)}
    for name, place, _ in places(abstract_params):
        array, target = read(name), arrays[place.path]
        (target if place.layer is None else target[place.layer])[...] = array.T if place.transposed else array
    return _tree(arrays)


def _fold_scale(array: np.ndarray, path: tuple[str, ...], config: ModelConfig) -> np.ndarray:
    """What sqrt(embed_dim) times the embeddings comes to in the weights."""
    scale = np.float32(config.embed_dim**0.5)
    if path == ("embedding",):
        return array * scale
    return array / scale if path == ("final_norm", "scale") and config.tie_embeddings else array


def _leaves(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and array of each leaf, in the order of `WEIGHTS`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {tuple(str(step.key) for step in path): leaf for path, leaf in flat}
    if unknown := set(found) - set(WEIGHTS):
        name = "/".join(min(unknown))
        raise ValueError(f"the weights {name} have no name in Hugging Face's architectures; merge them into the model")
    return ((path, found[path]) for path in WEIGHTS if path in found)


def _tree(arrays: Mapping[tuple[str, ...], np.ndarray]) -> Any:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        inner = tree
        for step in path[:-1]:
            inner = inner.setdefault(step, {})
        inner[path[-1]] = array
    return tree
