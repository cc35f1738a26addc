"""The training step: loss, gradients over micro-batches, one update. The one jit site of training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from tale_jax.config import Config
from tale_jax.hardware.backend import Backend
from tale_jax.hardware.sharding import batch_sharding, make_mesh, shardings
from tale_jax.model.loss import loss_mask
from tale_jax.model.transformer import Transformer, make_model, token_losses
from tale_jax.training.ema import update_ema
from tale_jax.training.guard import is_spike
from tale_jax.training.loss_scale import next_scale
from tale_jax.training.optimizer import MatrixShape, make_optimizer
from tale_jax.training.schedule import learning_rate
from tale_jax.training.state import TrainState, init_state
from tale_jax.utils.outliers import with_value

TrainStep = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    config: Config, model: Transformer, optimizer: optax.GradientTransformation, rate: optax.Schedule, bos_id: int
) -> TrainStep:
    """A pure function (state, windows [batch_size, seq_len + 1]) → (state, metrics).

    More, shorter windows of as many tokens (see `loader.split_windows`) are taken as well. The batch is split into
    micro-batches whose gradients are summed, so that accumulation changes nothing but memory. Metrics are scalars:
    `loss` in nats per token (of the tokens in `loss_mask`), `grad_norm` before clipping, `learning_rate`, `skipped`
    (see `guard.py`), and in float16 `loss_scale`, by which the first two are divided already.
    """
    micro_tokens = config.micro_batch_size * config.model.seq_len
    dropout = max(config.model.dropout, config.model.embedding_dropout, config.lora.dropout) > 0

    def gradients(state: TrainState, windows: Array, key: Array, scale: Array | float) -> tuple[Array, Any]:
        params = state.params
        num_counted = jnp.sum(loss_mask(windows[:, 1:], bos_id))

        def loss_fn(params: Any, windows: Array, key: Array) -> Array:
            weights = loss_mask(windows[:, 1:], bos_id) * (scale / num_counted)
            return token_losses(model, state.weights(params), windows, bos_id, weights, key if dropout else None)

        num_micro = max(1, windows[:, 1:].size // micro_tokens)
        if num_micro == 1:
            return jax.value_and_grad(loss_fn)(params, windows, key)
        # Every device keeps its own sequences: micro-batch i takes the i-th part of each device's.
        micro = windows.reshape(-1, num_micro, windows.shape[-1]).swapaxes(0, 1)

        def add(total: Any, item: tuple[Array, Array]) -> tuple[Any, None]:
            one = jax.value_and_grad(loss_fn)(params, *item)
            return jax.tree_util.tree_map(jnp.add, total, one), None

        zero = (jnp.zeros(()), jax.tree_util.tree_map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, (micro, jax.random.split(key, num_micro)))[0]

    def train_step(state: TrainState, windows: Int[Array, "B T1"]) -> tuple[TrainState, dict[str, Array]]:
        key, scale = jax.random.fold_in(state.key, state.step), state.scale
        loss, grads = gradients(state, windows, key, 1.0 if scale is None else scale.value)
        if scale is not None:
            loss, grads = jax.tree_util.tree_map(lambda x: x / scale.value, (loss, grads))
        norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate(state.step)}
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if scale is not None:
            scale = next_scale(scale, finite)
            metrics |= {"loss_scale": scale.value}
        ema = state.ema_params
        ema = ema if ema is None else update_ema(ema, params, config.ema.decay, state.step)
        counts = finite if config.on_spike == "off" else finite & ~is_spike(state.losses, loss)
        new = {"params": params, "opt_state": opt_state, "ema_params": ema}
        old = {name: getattr(state, name) for name in new}
        new = jax.tree_util.tree_map(lambda a, b: jnp.where(counts, a, b), new, old)
        new |= {"scale": scale, "losses": with_value(state.losses, loss, counts)}
        return state.replace(step=state.step + 1, **new), metrics | {"skipped": ~counts}

    return train_step


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in jax.tree_util.tree_leaves(tree)), jnp.zeros(())))


class Trainer:
    """The compiled functions of a run on a mesh, and the shardings that tie them to devices.

    Attributes:
      model: what is trained.
      abstract_state: shapes of the state; state_shardings: where its arrays lie.
      init: () → the state before the first step; (weights of a base) → that of fine-tuning it.
      jitted_step: (state, windows) → (state, metrics), compiled for each shape of windows as it comes by.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        optimizer: optax.GradientTransformation,
        rate: optax.Schedule,
        bos_id: int,
        mesh: Mesh,
        donate: bool,
    ):
        def init(base: Any = None) -> TrainState:
            return init_state(model, optimizer, config.seed, config.ema.decay > 0, config.lora, base)

        self.model = model
        self.abstract_state = jax.eval_shape(init)
        self.state_shardings = shardings(mesh, self.abstract_state)
        self.batch_sharding = batch_sharding(mesh)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.init = jax.jit(init, out_shardings=self.state_shardings)
        spread = model.clone(batch_sharding=self.batch_sharding) if mesh.size > 1 else model
        self.jitted_step = jax.jit(
            make_train_step(config, spread, optimizer, rate, bos_id),
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, self.replicated),
            donate_argnums=(0,) if donate else (),
        )
        self._windows = jax.ShapeDtypeStruct((config.batch_size, config.model.seq_len + 1), jnp.int32)
        self._compiled: Any = None

    def compile(self) -> Any:
        """Compiles the step for whole windows ahead of its first use; returns the executable, to be analysed."""
        self._compiled = self.jitted_step.lower(self.abstract_state, self._windows).compile()
        return self._compiled

    def step(self, state: TrainState, windows: Int[Array, "B T1"]) -> tuple[TrainState, dict[str, Array]]:
        """One update; by the executable of `compile` where there is one for this shape."""
        if self._compiled is not None and windows.shape == self._windows.shape:
            return self._compiled(state, windows)
        return self.jitted_step(state, windows)

    def block_of_rows(self, num_rows: int) -> tuple[int, int]:
        """Which of how many equal blocks of a batch's rows lie on the devices of this process."""
        places = self.batch_sharding.addressable_devices_indices_map((num_rows,)).values()
        rows = {row for (part,) in filter(None, places) for row in range(num_rows)[part]}
        return min(rows) // len(rows), num_rows // len(rows)

    def place(self, windows: Integer[np.ndarray, "B T1"]) -> Array:
        """Puts this process's rows of a batch on the devices that share it."""
        if jax.process_count() == 1:
            return jax.device_put(windows, self.batch_sharding)
        return jax.make_array_from_process_local_data(self.batch_sharding, windows)

    def place_same(self, batch: np.ndarray) -> Array:
        """Puts a whole batch, which every process holds alike, on the devices that share it."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch_sharding)
        return jax.make_array_from_callback(batch.shape, self.batch_sharding, lambda index: batch[index])


def make_trainer(config: Config, backend: Backend, dtype: Any, bos_id: int) -> Trainer:
    """The trainer of a config whose length is known, computing in `dtype` on the devices of `backend`."""
    model = make_model(config, backend, dtype)
    rate = learning_rate(config.schedule, config.optimizer, config.total_steps)
    shape = MatrixShape(config.model.head_dim, backend.materialize_transposes, dtype)
    optimizer = make_optimizer(config.optimizer, rate, shape)
    mesh = make_mesh(config, backend.devices)
    return Trainer(config, model, optimizer, rate, bos_id, mesh, backend.donate)
