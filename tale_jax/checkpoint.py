"""The only importer of orbax: what a run saves, and the one path by which it comes back.

Checkpoint N lies in `workdir/checkpoints/N/`, in a few items: `params`, and `average` where the run keeps one (all that
evaluation and sampling need is one of these), `training` (optimizer state, step, random state), `data` (position in the
token windows) and `meta` (validation loss).
Where the host is free, steps go on while the arrays are written; on a CPU that would take as long, and a second copy of
the state. A folder without its final name is no checkpoint.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tale_jax.config import Config
from tale_jax.model.transformer import Transformer
from tale_jax.text.tokenizer import Tokenizer, tokenizer_file
from tale_jax.training.average import mean
from tale_jax.training.scaling import LossScale, first_scale
from tale_jax.training.state import TrainState

NAME = "nats_per_token"
ITEMS = ("params", "average", "training")  # the arrays of a checkpoint; of these `average` is in some only


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them stay, and the best by validation loss.

    `at_once`: bytes that are on their way to the disk at a time, while `save` waits; 0: `save` copies the state and
    returns, and the copy is written in the background.
    """

    def __init__(self, workdir: Path, keep: int, at_once: int = 0):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.keep = keep
        options = ocp.CheckpointManagerOptions(create=True, max_to_keep=None, enable_async_checkpointing=not at_once)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=_sparing_handlers(at_once))
        self._losses = {step: _read_meta(self._manager, step).get(NAME) for step in self._manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """The newest step saved, None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], loss: float | None) -> None:
        """Begins to save `state` and the data position; `loss` is the validation loss in nats per token, if known now.

        Raises OSError in one line when this save, or the one before it, failed (a full disk): the older ones are still
        there.
        """
        if step in self._losses:
            return
        self.wait()
        self._prune()
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(arrays) for name, arrays in _arrays(state).items()},
            data=ocp.args.JsonSave(dict(data)),
            meta=ocp.args.JsonSave({"step": step, NAME: loss} | _saved_scale(state.scale)),
        )
        with self._written():
            self._manager.save(step, args=items)
        self._losses[step] = loss

    def restore(self, abstract_state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and data position, laid out on the devices of `shardings`, whichever saved them."""
        step = self.latest
        if step is None:
            raise ValueError(f"{self.folder} must hold a checkpoint; train first")
        target = jax.tree_util.tree_map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        items = {name: ocp.args.StandardRestore(arrays) for name, arrays in _arrays(target).items()}
        found = _restore(self._manager, step, ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        scale = target.scale and _restored_scale(target.scale, _read_meta(self._manager, step))
        state = TrainState(params=found.params, average=found.get("average"), scale=scale, **found.training)
        return state, dict(found.data)

    def wait(self) -> None:
        """Until the save under way is on disk. Raises OSError in one line if it failed."""
        with self._written():
            self._manager.wait_until_finished()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises what its writers hit: OSError, ValueError, tensorstore's own
            raise OSError(f"{self.folder}: the checkpoint could not be written ({_reason(error)})") from error

    def close(self) -> None:
        """Finishes the save under way and lets go of what is no longer kept."""
        self.wait()
        self._prune()
        self._manager.close()

    def _prune(self) -> None:
        steps = sorted(self._manager.all_steps())
        best = _best({step: self._losses.get(step) for step in steps})
        for step in steps[: -self.keep]:
            if step != best:
                self._manager.delete(step)
                self._losses.pop(step, None)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A trained model as evaluation, sampling and conversion need it.

    `weights` are of `step`: last (as the step left them), ema (their moving average), or mean:K (of K checkpoints).
    """

    workdir: Path
    config: Config
    step: int
    weights: str
    tokenizer: Tokenizer
    model: Transformer
    params: Any


def open_experiment(
    workdir: Path, step: int = 0, dtype: Any = jnp.float32, natural: bool = False, weights: str = "auto"
) -> Experiment:
    """Restores the weights of a workdir on the default device.

    Args:
      workdir: of the experiment.
      step: of the checkpoint; 0: the best by validation loss (for mean:K the newest).
      dtype, natural: how the model will compute (see `Transformer`); the weights are float32.
      weights: last, as the step left them; ema, their moving average; auto, ema where the run kept one, else last; or
        mean:K, the mean over the newest K checkpoints, up to `step`.

    Raises:
      ValueError: in one line, when there is no experiment, no checkpoint, not that one, or not those weights.
    """
    workdir, count = Path(workdir), _count(weights)
    config = Config.load(workdir)
    folder = workdir.absolute() / "checkpoints"
    steps = [int(entry.name) for entry in folder.glob("[0-9]*") if entry.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise ValueError(
            f"workdir={workdir} must hold a checkpoint (none in {folder}); train first with launch/train.py"
        )
    if step and step not in steps:
        raise ValueError(f"step={step} must be a checkpoint of {folder}; there is {', '.join(map(str, sorted(steps)))}")
    model = Transformer(config.model, config.tokenizer.vocab_size, dtype, natural)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False, read_only=True)) as manager:
        if not step:
            best = None if count else _best({s: _read_meta(manager, s).get(NAME) for s in manager.all_steps()})
            step = best or max(steps)
        averaged = (folder / str(step) / "average").is_dir()
        chosen = sorted(s for s in steps if s <= step)[-max(1, count) :]
        if len(chosen) < count or (weights == "ema" and not averaged):
            means = f"mean:K of the {len(chosen)} checkpoints up to step {step}" if count else "mean:K"
            raise ValueError(
                f"weights={weights} must be what the run kept; there is {'ema, ' if averaged else ''}last, and {means}"
            )
        weights = weights if weights != "auto" else "ema" if averaged else "last"
        item = "average" if weights == "ema" else "params"
        wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        params = mean(_restore(manager, each, wanted)[item] for each in chosen)
    tokenizer = Tokenizer.load(tokenizer_file(workdir))
    return Experiment(workdir, config, step, weights, tokenizer, model, params)


def _count(weights: str) -> int:
    """Of checkpoints in mean:K, 0 for other weights. Raises ValueError for what cannot be."""
    if found := re.fullmatch(r"mean:([1-9]\d*)", weights):
        return int(found[1])
    if weights not in ("auto", "last", "ema"):
        raise ValueError(f"weights={weights} must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2")
    return 0


def _arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by the items they are saved in."""
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key},
    }
    return items if state.average is None else items | {"average": state.average}


def _best(losses: Mapping[int, float | None]) -> int | None:
    """The step of the lowest loss, None when none is known."""
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def bytes_at_once(state: Any, host_is_free: bool) -> int:
    """For `Checkpoints`: enough to keep a disk busy, and more than the largest array of `state`, as orbax demands.

    0, no limit, where the host has nothing else to do.
    """
    if host_is_free:
        return 0
    return max(32 << 20, 2 * max(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(state)))


def _sparing_handlers(at_once: int) -> dict[str, Any] | None:
    if not at_once:
        return None
    gigabytes: Any = at_once / 1e9  # orbax says int, and multiplies
    arrays = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes) for name in ITEMS}
    return arrays | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}


def _saved_scale(scale: LossScale | None) -> dict[str, Any]:
    return {"loss_scale": [float(scale.value), int(scale.good)]} if scale else {}


def _restored_scale(target: LossScale, meta: Mapping[str, Any]) -> LossScale:
    """The loss scale that was saved, or the first one where the run did not compute in float16 before."""
    first = first_scale()
    value, good = meta.get("loss_scale", (first.value, first.good))
    scale = LossScale(jnp.asarray(value, jnp.float32), jnp.asarray(good, jnp.int32))
    return jax.tree_util.tree_map(lambda x, like: jax.device_put(x, like.sharding), scale, target)


def _restore(manager: ocp.CheckpointManager, step: int, args: Any) -> Any:
    folder = os.path.join(manager.directory, str(step))
    try:
        return manager.restore(step, args=args)
    except Exception as error:  # what orbax raises depends on which file is damaged or missing
        others = sorted(s for s in manager.all_steps() if s != step)
        remedy = f"remove that folder to go on from step {others[-1]}" if others else "restore it from a copy"
        raise ValueError(f"{folder} is not a checkpoint that can be read ({_reason(error)}); {remedy}") from error


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        return dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
    except Exception:  # a damaged checkpoint has no known loss; restoring it says what is wrong
        return {}


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
