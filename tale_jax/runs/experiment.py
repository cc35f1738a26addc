"""A workdir opened: the one path by which a trained model is restored, for evaluation, sampling and conversion.

experiment = open_experiment(Path("experiments/tales"), start_backend("auto"))
sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tale_jax.config import Config
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.model.transformer import Kernels, Transformer, make_model
from tale_jax.training.checkpoint import SavedParams
from tale_jax.utils.progress import Progress, notice


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A trained model, its tokenizer and its settings.

    `weights` says what `params` are: last (as `step` left them), ema (their moving average), or mean:K (the mean of the
    K checkpoints up to `step`).
    """

    workdir: Path
    config: Config
    step: int
    weights: str
    tokenizer: Tokenizer
    model: Transformer
    params: Any


def open_experiment(
    workdir: Path, backend: Kernels, step: int = 0, dtype: Any = jnp.float32, weights: str = "auto"
) -> Experiment:
    """Restores the weights of a workdir on the default device.

    Args:
      workdir: of the experiment.
      backend: from `start_backend`.
      step: of the checkpoint; 0: the best by validation loss (for mean:K the newest).
      dtype: what the model computes in; the weights are float32.
      weights: last, as the step left them; ema, their moving average; auto: ema where the run kept one, else last; or
        mean:K, the mean over the newest K checkpoints up to `step`.

    Raises:
      ValueError: in one line, when there is no experiment, no checkpoint, not that one, or not those weights.
    """
    workdir, count = Path(workdir), _count_of_mean(weights)
    config = Config.load(workdir)
    saved = SavedParams(workdir)
    if not saved.steps:
        raise ValueError(
            f"workdir={workdir} must hold a checkpoint (none in {saved.folder}); train first with launch/train.py"
        )
    if step and step not in saved.steps:
        steps = ", ".join(map(str, saved.steps))
        raise ValueError(f"step={step} must be a checkpoint of {saved.folder}; there is {steps}")
    model = make_model(dataclasses.replace(config, remat="none"), backend, dtype)
    with Progress("restoring the weights", every_seconds=math.inf), saved:
        wanted_step, step = step, step or (saved.steps[-1] if count else saved.best())
        has_ema = saved.has_ema(step)
        steps = [s for s in saved.steps if s <= step][-max(1, count) :]
        if len(steps) < count or (weights == "ema" and not has_ema):
            means = f"mean:K of the {len(steps)} checkpoints up to step {step}" if count else "mean:K"
            raise ValueError(
                f"weights={weights} must be what the run kept; there is {'ema, ' if has_ema else ''}last, and {means}"
            )
        weights = weights if weights != "auto" else "ema" if has_ema else "last"
        params = saved.load(steps, _abstract_params(model), ema=weights == "ema")
        note = ""
        if not wanted_step and not count and step != saved.steps[-1]:
            note = f"checkpoint of step {step}, the best by validation loss; the last is of step {saved.steps[-1]}"
    if note:
        notice(note)
    tokenizer = Tokenizer.load(tokenizer_file(workdir))
    return Experiment(workdir, config, step, weights, tokenizer, model, params)


def _abstract_params(model: Transformer) -> Any:
    """Shapes of the weights, on the default device."""
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def _count_of_mean(weights: str) -> int:
    """K of mean:K, 0 for other weights. Raises ValueError, in one line, for weights that there never are."""
    if found := re.fullmatch(r"mean:([1-9]\d*)", weights):
        return int(found[1])
    if weights not in ("auto", "last", "ema"):
        raise ValueError(f"weights={weights} must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2")
    return 0
