"""What a training step carries from one step to the next."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tale_jax.model.adapters import init_adapters, without_adapters
from tale_jax.model.initialization import with_induction_heads
from tale_jax.model.transformer import Transformer
from tale_jax.training.guard import WINDOW
from tale_jax.training.loss_scale import first_scale, needs_scale
from tale_jax.utils.outliers import no_values


class TrainState(flax.struct.PyTreeNode):
    """A pytree of arrays, or of their shapes: what is saved in a checkpoint, besides the data position."""

    step: Any  # updates done
    params: Any  # what is trained: the weights, or adapters of a base
    opt_state: Any
    key: Any  # raw PRNG key data, from which dropout at each step is derived
    ema_params: Any = None  # exponential moving average of params, where one is kept
    losses: Any = None  # the last ones, which tell a spike (see `guard.py`)
    scale: Any = None  # of the loss, computing in float16 (see `loss_scale.py`)
    base: Any = None  # `Adapted`, but for its adapters: weights that stay as they are, and are not saved

    def weights(self, params: Any) -> Any:
        """What the model is applied with, of `params` or of their moving average."""
        return params if self.base is None else self.base.replace(adapters=params)

    @property
    def eval_params(self) -> Any:
        """The weights that validation and samples use: their moving average where there is one."""
        return self.weights(self.params if self.ema_params is None else self.ema_params)


def init_state(
    model: Transformer, optimizer: Any, seed: int, with_ema: bool = False, lora: Any = None, base: Any = None
) -> TrainState:
    """What is trained before the first step: `base`, or weights by shape and seed; with a rank of `lora`, adapters."""
    init_key, key = jax.random.split(jax.random.PRNGKey(seed))
    params = model.init(init_key, jnp.zeros((1, 8), jnp.int32))["params"] if base is None else base
    if model.config.induction_init and base is None:
        params = with_induction_heads(params, model.config)
    adapted = without_adapters(params, lora) if lora and lora.rank else None
    params = init_adapters(params, lora, init_key) if lora and lora.rank else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        ema_params=params if with_ema else None,
        losses=no_values(WINDOW),
        scale=first_scale() if needs_scale(model.dtype) else None,
        base=adapted,
    )
