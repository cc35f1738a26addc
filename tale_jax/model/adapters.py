"""Low-rank updates beside weights that stay as they are: LoRA, and on top of it DoRA.

    y = x W + scale · (dropout(x) A) B           A [in, r] is random at first, B [r, out] is 0 (Hu et al. 2021)
    y = gain · |W| / |W + scale · A B| · (…)     DoRA (Liu et al. 2024): a gain for each column, 1 at first

Sizes |·| are those of columns, and are taken as constants in the gradient. Both leave the model as it was, to the bit,
until they have learned something. The transformer knows nothing of them: flax lets a function stand between a module
and its caller, and where the collection `ADAPTERS` has something for a linear layer, that function adds it. So there
is no gradient, and no optimizer state, as large as the weights.

    weights = Adapted(params, init_adapters(params, config.lora, key), config.lora.scale)
    logits, _ = apply(model, weights, tokens)          # as model.apply({"params": merged(weights)}, tokens)
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tale_jax.config import LoraConfig
from tale_jax.model.layers import dropout, matmul
from tale_jax.utils.settings import mistake

ADAPTERS = "adapters"
TINY = 1e-30  # of a column of zeros


class Adapted(flax.struct.PyTreeNode):
    """Weights and the updates to them: in place of the weights wherever a model is applied."""

    base: Any
    adapters: Any
    scale: float = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)


def without_adapters(params: Any, config: LoraConfig) -> Adapted:
    """The weights of a base, waiting for their updates."""
    return Adapted(params, None, config.scale, config.dropout)


def init_adapters(params: Any, config: LoraConfig, key: Array) -> Any:
    """Updates of the chosen matrices, by the names of their modules. Raises ValueError for too large a rank."""
    tree: dict[str, Any] = {}
    for index, (module, name, kernel) in enumerate(_kernels(params)):
        if name not in config.chosen:
            continue
        layers, rows, columns = kernel.shape
        if config.rank > min(rows, columns):
            rule = f"not exceed {min(rows, columns)}, the shorter side of {name} [{rows}, {columns}]"
            raise mistake("lora.rank", config.rank, rule, f"try --config.lora.rank={min(rows, columns)}")
        bound, shape = rows**-0.5, (layers, rows, config.rank)
        leaves = {
            "a": jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((layers, config.rank, columns)),
        }
        tree.setdefault(module, {})[name] = leaves | ({"gain": jnp.ones((layers, columns))} if config.dora else {})
    return {"blocks": tree}


def apply(model: nn.Module, weights: Any, /, *args: Any, **options: Any) -> Any:
    """`model.apply` with weights that may be `Adapted`; what updates read is dropped unless `deterministic`."""
    if not isinstance(weights, Adapted):
        return model.apply({"params": weights}, *args, **options)
    rate = 0.0 if options.get("deterministic", True) else weights.dropout
    with nn.intercept_methods(functools.partial(_with_update, weights.scale, rate)):
        return model.apply({"params": weights.base, ADAPTERS: weights.adapters}, *args, **options)


def _with_update(scale: float, rate: float, layer: Any, args: tuple, options: dict, context: Any) -> Any:
    """What a linear layer gives, with its update where it has one."""
    y, module = layer(*args, **options), context.module
    if context.method_name != "__call__" or not module.has_variable(ADAPTERS, "a"):
        return y
    (x,) = args
    a, b = (module.get_variable(ADAPTERS, name) for name in "ab")
    x = dropout(x, rate, module.make_rng("dropout")) if rate else x
    low = matmul(x, (scale * a).astype(x.dtype), module.materialize_transposes)
    y = y + matmul(low, b.astype(x.dtype), module.materialize_transposes)
    if not module.has_variable(ADAPTERS, "gain"):
        return y
    gain = module.get_variable(ADAPTERS, "gain") * column_ratio(module.get_variable("params", "kernel"), a, b, scale)
    return y * gain.astype(y.dtype)


def column_ratio(
    kernel: Float[Array, "*L C N"], a: Float[Array, "*L C r"], b: Float[Array, "*L r N"], scale: float
) -> Float[Array, "*L N"]:
    """|W| / |W + scale · A B| of each column, exactly 1 where B is 0, without making the sum.

    A column of zeros has no size to keep: it is 1 there, and the column learns as LoRA's do.
    """
    a = a.swapaxes(-1, -2)
    cross = jnp.sum(b * (a @ kernel), axis=-2)
    square = jnp.sum(b * ((a @ a.swapaxes(-1, -2)) @ b), axis=-2)
    size = jnp.sum(jnp.square(kernel), axis=-2)
    grown = 1 + (2 * scale * cross + scale**2 * square) / jnp.maximum(size, TINY)
    ratio = jnp.where(size > TINY, jax.lax.rsqrt(jnp.maximum(grown, TINY)), 1.0)
    return jax.lax.stop_gradient(ratio)


def merged(weights: Any) -> Any:
    """Weights that give the same alone; those that are not `Adapted` as they are."""
    if not isinstance(weights, Adapted):
        return weights
    blocks = dict(weights.base["blocks"])
    for module, name, kernel in _kernels(weights.base):
        update = weights.adapters["blocks"].get(module, {}).get(name)
        if update is None:
            continue
        kernel, update = jnp.asarray(kernel), {name: jnp.asarray(leaf) for name, leaf in update.items()}
        new = kernel + weights.scale * (update["a"] @ update["b"])
        if "gain" in update:
            new *= (update["gain"] * column_ratio(kernel, update["a"], update["b"], weights.scale))[..., None, :]
        blocks[module] = {**blocks[module], name: {"kernel": new}}
    return {**weights.base, "blocks": blocks}


def _kernels(params: Any) -> list[tuple[str, str, Any]]:
    """Module, name and stack [L, in, out] of every linear layer, always in the same order."""
    found = ((module, name, part) for module in ("attention", "mlp") for name, part in params["blocks"][module].items())
    return sorted(((m, name, part["kernel"]) for m, name, part in found if "kernel" in part), key=lambda k: k[:2])
