"""The only importer of orbax: what a run saves, and how it is read again.

Checkpoint N lies in `workdir/checkpoints/N/`, in a few items: `params`, and `ema` where the run keeps a moving average
(all that evaluation and sampling need is one of these), `training` (optimizer state, step, random state), `data`
(position in the token windows) and `meta` (validation loss).
With `overlap_io` steps go on while the arrays are written; on a CPU that would take as long, and a second copy of the
state. A folder without its final name is no checkpoint.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tale_jax.training.ema import mean_of_trees
from tale_jax.training.loss_scale import LossScale, first_scale
from tale_jax.training.state import TrainState

LOSS = "nats_per_token"
ARRAY_ITEMS = ("params", "ema", "training")  # of these `ema` is in some checkpoints only


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them stay, the best by validation loss, and those of each
    multiple of `keep_every` steps (0: no others).

    `max_concurrent_bytes`: bytes that are on their way to the disk at a time, while `save` waits; 0: `save` copies the
    state and returns, and the copy is written in the background.
    """

    def __init__(self, workdir: Path, keep: int, max_concurrent_bytes: int = 0, keep_every: int = 0):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.keep, self.keep_every = keep, keep_every
        options = ocp.CheckpointManagerOptions(
            create=True, max_to_keep=None, enable_async_checkpointing=not max_concurrent_bytes
        )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=_throttled_handlers(max_concurrent_bytes)
        )
        self._losses = {step: _read_meta(self._manager, step).get(LOSS) for step in self._manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """The newest step saved, None before the first."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the lowest validation loss; the newest where none is known, None before the first save."""
        return _best_step(self._losses) or self.latest

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
            meta=ocp.args.JsonSave({"step": step, LOSS: loss} | _saved_scale(state.scale)),
        )
        with self._written():
            self._manager.save(step, args=items)
        self._losses[step] = loss

    def save_params(self, step: int, params: Any) -> None:
        """Saves weights that no training here has led to. Raises OSError in one line when it fails."""
        arrays = ocp.args.StandardSave(params)
        meta = ocp.args.JsonSave({"step": step, LOSS: None})
        with self._written():
            self._manager.save(step, args=ocp.args.Composite(params=arrays, meta=meta))

    def restore(self, abstract_state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and data position, laid out on the devices of `shardings`, whichever saved them.

        The weights of a base are not saved: `base` of the result is that of `abstract_state`.
        """
        step = self.latest
        if step is None:
            raise ValueError(f"{self.folder} must hold a checkpoint; train first")
        target = jax.tree_util.tree_map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        items = {name: ocp.args.StandardRestore(arrays) for name, arrays in _arrays(target).items()}
        found = _restore(self._manager, step, ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        scale = target.scale and _restored_scale(target.scale, _read_meta(self._manager, step))
        state = abstract_state.replace(params=found.params, ema_params=found.get("ema"), scale=scale, **found.training)
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
        best = _best_step({step: self._losses.get(step) for step in steps})
        for step in steps[: -self.keep]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                self._manager.delete(step)
                self._losses.pop(step, None)


class SavedParams:
    """The weights in the checkpoints of a workdir, to be read; a context manager. `steps`: those there are, in
    order."""

    def __init__(self, workdir: Path):
        self.folder = Path(workdir).absolute() / "checkpoints"
        entries = self.folder.glob("[0-9]*") if self.folder.is_dir() else []
        self.steps = sorted(int(entry.name) for entry in entries if entry.name.isdigit())
        self._manager: Any = None

    def __enter__(self) -> "SavedParams":
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def best(self) -> int:
        """The step of the lowest validation loss; the newest where none is known."""
        losses = {step: _read_meta(self._manager, step).get(LOSS) for step in self._manager.all_steps()}
        return _best_step(losses) or self.steps[-1]

    def has_ema(self, step: int) -> bool:
        """Whether the moving average of the weights was saved at that step."""
        return (self.folder / str(step) / "ema").is_dir()

    def load(self, steps: Sequence[int], abstract_params: Any, ema: bool = False) -> Any:
        """The mean of the weights of these steps (or of their moving average), of the shapes and shardings given."""
        item = "ema" if ema else "params"
        wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract_params)})
        return mean_of_trees(_restore(self._manager, step, wanted)[item] for step in steps)


def save_params(workdir: Path, step: int, params: Any) -> None:
    """Writes weights alone as the checkpoint of a step: of a model that was trained elsewhere, to be read.

    Raises OSError in one line when it fails.
    """
    checkpoints = Checkpoints(workdir, keep=1, max_concurrent_bytes=max_concurrent_bytes(params, overlap_io=False))
    checkpoints.save_params(step, params)
    checkpoints.close()


def _arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by the items they are saved in."""
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key},
    }
    return items if state.ema_params is None else items | {"ema": state.ema_params}


def _best_step(losses: Mapping[int, float | None]) -> int | None:
    """The step of the lowest loss, None when none is known."""
    known = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def max_concurrent_bytes(state: Any, overlap_io: bool) -> int:
    """For `Checkpoints`: enough to keep a disk busy, and more than the largest array of `state`, as orbax demands.

    0, no limit, where writing overlaps with the steps.
    """
    if overlap_io:
        return 0
    return max(32 << 20, 2 * max(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(state)))


def _throttled_handlers(max_concurrent_bytes: int) -> dict[str, Any] | None:
    if not max_concurrent_bytes:
        return None
    gigabytes: Any = max_concurrent_bytes / 1e9  # orbax says int, and multiplies
    arrays = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes) for name in ARRAY_ITEMS}
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
