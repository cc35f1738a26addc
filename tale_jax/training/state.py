"""What a training step carries from one step to the next."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tale_jax.model.initialization import with_induction_heads
from tale_jax.model.transformer import Transformer
from tale_jax.training.guard import WINDOW
from tale_jax.training.loss_scale import first_scale, needs_scale
from tale_jax.utils.outliers import no_values


class TrainState(flax.struct.PyTreeNode):
    """A pytree of arrays, or of their shapes: what is saved in a checkpoint, besides the data position."""

    step: Any  # updates done
    params: Any
    opt_state: Any
    key: Any  # raw PRNG key data, from which dropout at each step is derived
    ema_params: Any = None  # exponential moving average of params, where one is kept
    losses: Any = None  # the last ones, which tell a spike (see `guard.py`)
    scale: Any = None  # of the loss, computing in float16 (see `loss_scale.py`)

    @property
    def eval_params(self) -> Any:
        """The weights that validation and samples use: their moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int, with_ema: bool = False
) -> TrainState:
    """Weights before the first step, by the model's shape and the seed. `with_ema`: a moving average is kept."""
    init_key, key = jax.random.split(jax.random.PRNGKey(seed))
    params = model.init(init_key, jnp.zeros((1, 8), jnp.int32))["params"]
    if model.config.induction_init:
        params = with_induction_heads(params, model.config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        ema_params=params if with_ema else None,
        losses=no_values(WINDOW),
        scale=first_scale() if needs_scale(model.dtype) else None,
    )
