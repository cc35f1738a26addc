"""The only importer of orbax: what a run saves, and the one path by which it comes back.

Checkpoint N lies in `workdir/checkpoints/N/`, in four items: `params` (all that evaluation and sampling need),
`training` (optimizer state, step, random state), `data` (position in the token windows) and `meta` (validation loss).
Where the host is free, steps go on while the arrays are written; on a CPU that would take as long, and a second copy of
the state. A folder without its final name is no checkpoint.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tale_jax.config import Config
from tale_jax.model.transformer import Transformer
from tale_jax.text.tokenizer import Tokenizer
from tale_jax.training.scaling import LossScale, first_scale
from tale_jax.training.state import TrainState

NAME = "nats_per_token"


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
        arrays = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(arrays),
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
        arrays = {"step": target.step, "opt_state": target.opt_state, "key": target.key}
        found = _restore(
            self._manager,
            step,
            ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                training=ocp.args.StandardRestore(arrays),
                data=ocp.args.JsonRestore(),
            ),
        )
        scale = _restored_scale(target.scale, _read_meta(self._manager, step))
        return TrainState(params=found.params, **found.training, scale=scale), dict(found.data)

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
    """A trained model as evaluation, sampling and conversion need it."""

    workdir: Path
    config: Config
    step: int
    tokenizer: Tokenizer
    model: Transformer
    params: Any


def open_experiment(workdir: Path, step: int = 0, dtype: Any = jnp.float32, natural: bool = False) -> Experiment:
    """Restores the weights of a workdir on the default device: step N, or 0 for the best by validation loss.

    `dtype` and `natural` are how the model will compute (see `Transformer`); the weights are float32.
    Raises ValueError in one line when there is no experiment, no checkpoint, or not that one.
    """
    workdir = Path(workdir)
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
            step = _best({s: _read_meta(manager, s).get(NAME) for s in manager.all_steps()}) or max(steps)
        found = _restore(manager, step, ocp.args.Composite(params=ocp.args.StandardRestore(target)))
    tokenizer = Tokenizer.load(workdir / "tokenizer" / "tokenizer.model")
    return Experiment(workdir, config, step, tokenizer, model, found.params)


def _best(losses: Mapping[int, float | None]) -> int | None:
    """The step of the lowest loss, None when none is known."""
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def bytes_at_once(state: Any) -> int:
    """For `Checkpoints`: enough to keep a disk busy, and more than the largest array of `state`, as orbax demands."""
    return max(32 << 20, 2 * max(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(state)))


def _sparing_handlers(at_once: int) -> dict[str, Any] | None:
    if not at_once:
        return None
    gigabytes: Any = at_once / 1e9  # orbax says int, and multiplies
    arrays = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes) for name in ("params", "training")}
    return arrays | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}


def _saved_scale(scale: LossScale | None) -> dict[str, Any]:
    return {"loss_scale": [float(scale.value), int(scale.good)]} if scale else {}


def _restored_scale(target: LossScale | None, meta: Mapping[str, Any]) -> LossScale | None:
    """The loss scale that was saved, or the first one where none was; None unless the run computes in float16."""
    if target is None:
        return None
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
