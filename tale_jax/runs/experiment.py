"""A workdir opened: the one path by which a trained model is restored, for evaluation, sampling and conversion.

experiment = open_experiment(Path("experiments/tales"), start_backend("auto"))
sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax.config import Config
from tale_jax.data.prepare import BASE_FOLDER, base_folder
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.model.adapters import Adapted, init_adapters, merged
from tale_jax.model.transformer import Kernels, Transformer, make_model
from tale_jax.training.checkpoint import SavedParams
from tale_jax.utils.files import write_atomically
from tale_jax.utils.progress import Progress, notice

BASE_FILE = "base.json"  # of a fine-tuned workdir: which base it was, by path, step and digest


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A trained model, its tokenizer and its settings.

    `weights` says what `params` are: last (as `step` left them), ema (their moving average), or mean:K (the mean of the
    K checkpoints up to `step`). Where adapters of a base were trained, they are merged into `params`, and `adapted` has
    both apart.
    """

    workdir: Path
    config: Config
    step: int
    weights: str
    tokenizer: Tokenizer
    model: Transformer
    params: Any
    adapted: Adapted | None = None


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
        shapes, base = _abstract_params(model), None
        if config.lora.rank:
            base = open_base(workdir, config, backend).params
            shapes = _on_default_device(
                jax.eval_shape(lambda tree: init_adapters(tree, config.lora, jax.random.PRNGKey(0)), shapes)
            )
        params = saved.load(steps, shapes, ema=weights == "ema")
        note = ""
        if not wanted_step and not count and step != saved.steps[-1]:
            note = f"checkpoint of step {step}, the best by validation loss; the last is of step {saved.steps[-1]}"
    if note:
        notice(note)
    tokenizer = Tokenizer.load(tokenizer_file(workdir))
    adapted = Adapted(base, params, config.lora.scale) if config.lora.rank else None
    return Experiment(workdir, config, step, weights, tokenizer, model, merged(adapted or params), adapted)


def open_base(workdir: Path, config: Config, backend: Kernels) -> Experiment:
    """The base of a workdir, in float32: the one whose digest `base.json` has, which is written where it is missing.

    Raises ValueError, in one line, when it is not there or is another one.
    """
    folder, file = base_folder(workdir, config.base), Path(workdir) / BASE_FILE
    if folder.resolve() == Path(workdir).resolve():
        raise ValueError(f"base={config.base} must not be the workdir itself; give another --workdir")
    known = json.loads(file.read_bytes()) if file.is_file() else {}
    move = f"copy or link it to {Path(workdir) / BASE_FOLDER}"
    if not (folder / "config.json").is_file():
        remedy = move if known else "give a workdir or a Hugging Face folder"
        raise ValueError(f"base={config.base} must hold a model (no config.json there); {remedy}")
    base = open_experiment(folder, backend, known.get("step", 0), weights=known.get("weights", "auto"))
    digest = digest_of(base.params)
    if known and known["digest"] != digest:
        raise ValueError(
            f"base={folder} must be the model of digest {known['digest'][:12]} that {workdir} was trained on, and has "
            f"{digest[:12]}; if you have that one, {move}"
        )
    if not known:
        known = {"path": str(folder), "step": base.step, "weights": base.weights, "digest": digest}
        write_atomically(file, json.dumps(known, indent=2) + "\n")
    return base


def digest_of(params: Any) -> str:
    """A digest of weights: of their names, shapes and values."""
    digest = hashlib.blake2b(digest_size=32)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _abstract_params(model: Transformer) -> Any:
    """Shapes of the weights, on the default device."""
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return _on_default_device(shapes)


def _on_default_device(shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def _count_of_mean(weights: str) -> int:
    """K of mean:K, 0 for other weights. Raises ValueError, in one line, for weights that there never are."""
    if found := re.fullmatch(r"mean:([1-9]\d*)", weights):
        return int(found[1])
    if weights not in ("auto", "last", "ema"):
        raise ValueError(f"weights={weights} must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2")
    return 0
