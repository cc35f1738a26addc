"""The training step: loss, gradients over micro-batches, one update. The one jit site of training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tale_jax.backend import Backend
from tale_jax.config import Config
from tale_jax.model.transformer import Transformer
from tale_jax.sharding import batch_sharding, make_mesh, shardings
from tale_jax.training.average import moving_average
from tale_jax.training.loss import document_segments
from tale_jax.training.optimizer import make_optimizer
from tale_jax.training.scaling import next_scale, where_finite
from tale_jax.training.schedule import learning_rate
from tale_jax.training.state import TrainState, init_state

TrainStep = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]


def token_losses(
    model: Transformer,
    params: Any,
    windows: Int[Array, "B T1"],
    bos_id: int,
    weights: Float[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T"] | Float[Array, ""]:
    """Nats of each token of a batch of windows but the first, or with `weights` their weighted sum.

    Training and scoring both call this.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    losses, _ = model.apply(
        {"params": params},
        inputs,
        segments=document_segments(inputs, bos_id) if model.config.mask_documents else None,
        targets=targets,
        weights=weights,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return losses


def make_train_step(
    config: Config, model: Transformer, optimizer: optax.GradientTransformation, rate: optax.Schedule, bos_id: int
) -> TrainStep:
    """A pure function (state, windows [batch_size, seq_len + 1]) → (state, metrics).

    More, shorter windows of as many tokens (see `data.cut`) are taken as well, and a part of a batch. What is given is
    cut into micro-batches whose gradients are summed, so that accumulation changes nothing but memory. Metrics are
    scalars: `loss` in nats per token (BOS not counted, as in evaluation), `grad_norm` before clipping, `learning_rate`,
    and in float16 `loss_scale`, by which both are divided already.
    """
    micro_tokens = config.micro_batch_size * config.model.seq_len
    dropout = config.model.dropout > 0 or config.model.word_dropout > 0
    decay = config.average.decay

    def gradients(params: Any, windows: Array, key: Array, scale: Array | float) -> tuple[Array, Any]:
        # BOS carries no text, so it is not learned, as evaluation does not count it.
        num_counted = jnp.sum(windows[:, 1:] != bos_id)

        def loss_fn(params: Any, windows: Array, key: Array) -> Array:
            weights = (windows[:, 1:] != bos_id) * (scale / num_counted)
            return token_losses(model, params, windows, bos_id, weights, key if dropout else None)

        num_micro = max(1, windows[:, 1:].size // micro_tokens)
        if num_micro == 1:
            return jax.value_and_grad(loss_fn)(params, windows, key)
        # Every device keeps its own sequences: micro-batch i takes each device's i-th share.
        micro = windows.reshape(-1, num_micro, windows.shape[-1]).swapaxes(0, 1)

        def add(total: Any, item: tuple[Array, Array]) -> tuple[Any, None]:
            one = jax.value_and_grad(loss_fn)(params, *item)
            return jax.tree_util.tree_map(jnp.add, total, one), None

        zero = (jnp.zeros(()), jax.tree_util.tree_map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, (micro, jax.random.split(key, num_micro)))[0]

    def train_step(state: TrainState, windows: Int[Array, "B T1"]) -> tuple[TrainState, dict[str, Array]]:
        key, scale = jax.random.fold_in(state.key, state.step), state.scale
        loss, grads = gradients(state.params, windows, key, 1.0 if scale is None else scale.value)
        if scale is not None:
            loss, grads = jax.tree_util.tree_map(lambda x: x / scale.value, (loss, grads))
        norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate(state.step)}
        if scale is not None:
            finite = jnp.isfinite(norm)
            params, opt_state = where_finite(finite, (params, opt_state), (state.params, state.opt_state))
            scale = next_scale(scale, finite)
            metrics |= {"loss_scale": scale.value}
        average = moving_average(state.average, params, decay, state.step) if decay else None
        new = {"params": params, "opt_state": opt_state, "average": average, "scale": scale}
        return state.replace(step=state.step + 1, **new), metrics

    return train_step


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all arrays of a tree together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in jax.tree_util.tree_leaves(tree)), jnp.zeros(())))


class Trainer:
    """The compiled functions of a run on a mesh: `init`, `step`, and the shardings that tie them to devices.

    `early_step` is `step` for the shorter windows or smaller batches that a run may begin with; it compiles when it is
    first called.
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
        def init() -> TrainState:
            return init_state(model, optimizer, config.seed, average=config.average.decay > 0)

        self.model = model
        self.abstract_state = jax.eval_shape(init)
        self.state_shardings = shardings(mesh, self.abstract_state)
        self.batch_sharding = batch_sharding(mesh)
        self._windows = jax.ShapeDtypeStruct((config.batch_size, config.model.seq_len + 1), jnp.int32)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.init = jax.jit(init, out_shardings=self.state_shardings)
        self.step: Any = jax.jit(
            make_train_step(config, model, optimizer, rate, bos_id),
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, replicated),
            donate_argnums=(0,) if donate else (),
        )
        self.early_step = self.step

    def compile(self) -> Any:
        """Compiles the step ahead of its first use, which then runs what was compiled; returns that, to be analysed."""
        self.step = self.step.lower(self.abstract_state, self._windows).compile()
        return self.step

    def place(self, windows: Any) -> Array:
        """Puts this process's rows of a batch [B, T+1] on the devices that share it."""
        if jax.process_count() == 1:
            return jax.device_put(windows, self.batch_sharding)
        return jax.make_array_from_process_local_data(self.batch_sharding, windows)


def make_trainer(config: Config, backend: Backend, dtype: Any, bos_id: int) -> Trainer:
    """The trainer of a planned config, computing in `dtype` on the devices of `backend`."""
    vocab_size = config.tokenizer.vocab_size
    model = Transformer(config.model, vocab_size, dtype, backend.natural, config.remat, backend.fused)
    rate = learning_rate(config.schedule, config.optimizer, config.total_steps)
    optimizer = make_optimizer(config.optimizer, rate, config.model.head_dim, backend.natural, dtype)
    mesh = make_mesh(config.mesh, backend.devices, config.micro_batch_size)
    parts, count = config.schedule.small_divisor, len(backend.devices)
    if config.schedule.small_fraction and config.batch_size // parts % count:
        raise ValueError(
            f"schedule.small_divisor={parts} must leave parts of batch_size={config.batch_size} that the {count} "
            f"devices divide; try schedule.small_fraction=0.0, or a larger batch_size"
        )
    return Trainer(config, model, optimizer, rate, bos_id, mesh, backend.donate)
