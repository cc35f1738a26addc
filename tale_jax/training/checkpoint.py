"""The only importer of orbax: what a run saves, and how it is read again.

Checkpoint N lies in `workdir/checkpoints/N/`, in a few items: `params`, and `ema` where the run keeps a moving average
(all that evaluation and sampling need is one of these), `training` (optimizer state, step, random state) and `data`
(position in the token windows). Last comes `manifest.json`: the SHA-256 sum of every file, the step, the validation
loss, and what the run is. Without a whole manifest that fits, a checkpoint does not exist: one that a kill left
half-written, or that was damaged since, is passed over and named.

With `overlap_io` steps go on while the arrays are written; on a CPU that would take as long, and a second copy of the
state.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tale_jax.hardware.distributed import from_main_process
from tale_jax.hardware.machine import release_memory
from tale_jax.training.guard import WINDOW
from tale_jax.training.loss_scale import LossScale, first_scale
from tale_jax.training.state import TrainState
from tale_jax.utils.files import check_inside, write_atomically
from tale_jax.utils.format import format_bytes
from tale_jax.utils.manifests import MANIFEST, SumsAhead, check_manifest, files_below, read_manifest, write_manifest
from tale_jax.utils.outliers import no_values
from tale_jax.utils.streams import notice

LOSS = "nats_per_token"
ARRAY_ITEMS = ("params", "ema", "training")  # of these `ema` is in some checkpoints only
DAMAGED = "damaged"  # folder of the workdir for checkpoints that cannot be believed
BEGUN = ".saving"  # file beside the checkpoints: the step that is being saved
MAX_COMPRESSION = 1000  # of the arrays of a checkpoint; more is no weights, and may be more than memory holds

# What orbax logs as an error it raises as well, and that is told in one line.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them stay, the best by validation loss, and those of each
    multiple of `keep_every` steps (0: no others).

    What a kill left half-written is removed, and what is damaged is set aside and named, before anything is read.

    Args:
      workdir: of the run.
      keep: how many stay.
      max_concurrent_bytes: bytes that are on their way to the disk at a time, while `save` waits; 0: `save` copies the
        state and returns, and the copy is written in the background.
      keep_every: steps, of whose multiples all stay; 0: of none.
      facts: what the run is, in JSON's types; it goes into each manifest from then on, as the attribute says it.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        max_concurrent_bytes: int = 0,
        keep_every: int = 0,
        *,
        facts: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.keep, self.keep_every, self.facts = keep, keep_every, dict(facts or {})
        latest, losses = from_main_process(self._clean)
        self._losses: dict[int, float | None] = {int(step): loss for step, loss in losses.items()}
        self._whole = set() if latest is None else {latest}  # steps that this process found whole, or wrote
        self._overlaps = not max_concurrent_bytes
        options = ocp.CheckpointManagerOptions(create=True, max_to_keep=None, enable_async_checkpointing=self._overlaps)
        self._names = _PlainPath(self.folder)
        self._manager = ocp.CheckpointManager(
            self._names.path, options=options, item_handlers=item_handlers(max_concurrent_bytes)
        )
        self._sealing: Future[None] | None = None
        self._sealer = ThreadPoolExecutor(1)
        self._saving_bytes = 0
        self._read_back = False  # whether what was saved has been read once by this process

    def _clean(self) -> list[Any]:
        """Removes and sets aside what is no checkpoint; the newest that is whole, and the loss of each."""
        if self.folder.is_symlink():
            check_inside(self.folder.parent, self.folder)
        for entry in leftovers(self.folder):
            shutil.rmtree(entry, ignore_errors=True)
        begun = _begun(self.folder)
        for step in unsealed(self.folder):
            if is_of_before(self.folder, step):
                write_manifest(self.folder / str(step), facts_of_before(self.folder, step) | self.facts)
                notice(f"checkpoint {step} had no digests, as earlier versions wrote it; it is given some as it is")
            elif step == begun:
                shutil.rmtree(self.folder / str(step))
        (self.folder / BEGUN).unlink(missing_ok=True)
        # All that have no manifest, and of the others the newest until one is whole: reading more would take too long.
        for step in (*unsealed(self.folder), *sorted(read_manifests(self.folder), reverse=True)):
            try:
                check_checkpoint(self.folder, step)
            except ValueError as error:
                place = set_aside(self.folder, step)
                notice(f"checkpoint {step} is not used: {error}; it lies in {place} now")
            else:
                break
        losses = {step: manifest.get(LOSS) for step, manifest in read_manifests(self.folder).items()}
        return [max(losses, default=None), losses]

    @property
    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, None where there is none."""
        return max(self._whole, default=None)

    @property
    def manifest(self) -> dict[str, Any]:
        """That of the newest whole checkpoint, {} where there is none."""
        return {} if self.latest is None else read_manifest(self.folder / str(self.latest))

    def check_space(self, abstract_state: TrainState) -> None:
        """Raises OSError, in one line, when the disk has no room for the checkpoints that will be kept and one more."""
        there = sum((self.folder / name).lstat().st_size for name in files_below(self.folder))
        _check_space(self.folder, (self.keep + 1) * num_bytes(abstract_state) - there)

    @property
    def best(self) -> int | None:
        """The step of the lowest validation loss; the newest where none is known, None before the first save."""
        return _best_step(self._losses) or self.latest

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], loss: float | None) -> None:
        """Begins to save `state` and the data position; `loss` is the validation loss in nats per token, if known now.

        The first checkpoint is read again and compared, so that a disk, or a name, that orbax cannot read is known now.

        Raises:
          OSError: in one line, when this save, or the one before it, failed; the older ones are still there.
          ValueError: the state holds a number that is not finite; nothing is saved.
        """
        if step in self._losses:
            return
        self.wait()
        arrays = arrays_of(state)
        self._prune()
        sums = self._write(step, arrays, data=ocp.args.JsonSave(dict(data)))
        if bad := next((name for name, (_, is_finite) in sums.items() if not is_finite), ""):
            self._manager.wait_until_finished()
            self._ahead.stop()
            if self._is_main:
                shutil.rmtree(self.folder / str(step))
                (self.folder / BEGUN).unlink(missing_ok=True)
            kept = f"checkpoint {self.latest} is whole; go on from there" if self.latest else "begin anew"
            rate = self.facts.get("settings", {}).get("optimizer", {}).get("learning_rate", 0.0)
            smaller = f"--config.optimizer.learning_rate={rate / 2:g}" if rate else "a smaller optimizer.learning_rate"
            raise ValueError(f"{bad} is not finite at step {step}, so nothing of it is saved; {kept} with {smaller}")
        facts = self._seal_later(step, loss, sums, {"data": dict(data), **_saved_scale(state.scale)})
        if not self._overlaps or not self._read_back:
            self.wait()
        if not self._read_back:
            self._read_back = True
            self._compare(step, arrays, facts["arrays"])

    @property
    def _is_main(self) -> bool:
        return jax.process_index() == 0

    def _write(self, step: int, arrays: Mapping[str, Any], **items: Any) -> dict[str, tuple[str, bool]]:
        """Hands arrays and other `items` to orbax; the sums of the arrays (see `_named`), taken while it writes."""
        items |= {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._saving_bytes = num_bytes(arrays)
        sums = _array_sums(arrays)  # not waited for
        self._ahead = SumsAhead(lambda: self._folders_of(step))
        with self._written():
            _check_space(self.folder, self._saving_bytes)
            if self._is_main:
                write_atomically(self.folder / BEGUN, str(step))
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return _named(sums)

    def _folders_of(self, step: int) -> list[Path]:
        """Where the process that writes the manifest finds a step, under orbax's temporary names and its own."""
        return [self.folder / str(step), *self.folder.glob(f"{step}.*")] if self._is_main else []

    def _seal_later(self, step: int, loss: float | None, sums: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Lets a thread write the manifest when the arrays are on disk; its facts of the arrays."""
        facts = {"arrays": {name: digest for name, (digest, _) in sums.items()}, **facts}
        self._losses[step] = loss
        self._sealing = self._sealer.submit(self._seal, step, {"step": step, LOSS: loss, **facts} | self.facts)
        return facts

    def _seal(self, step: int, facts: Mapping[str, Any]) -> None:
        """Waits until the arrays are on disk, and writes the manifest: from now on the checkpoint exists."""
        self._manager.wait_until_finished()
        known = self._ahead.stop()
        if self._is_main:
            write_manifest(self.folder / str(step), facts, known)
            (self.folder / BEGUN).unlink(missing_ok=True)
        self._whole.add(step)

    def _compare(self, step: int, arrays: Mapping[str, Any], saved: Mapping[str, str]) -> None:
        """Reads a checkpoint item by item, into host memory. Raises OSError when it is not what was saved."""
        for name, tree in arrays.items():
            target = jax.tree_util.tree_map(lambda x: np.empty(x.shape, x.dtype), tree)  # no memory is touched yet
            cause: ValueError | None = None
            release_memory()  # of the save, and of the item before: one is held a second time
            try:
                args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
                same = digests({name: _restore(self._manager, step, args)[name]}).items() <= saved.items()
            except ValueError as error:
                same, reason, cause = False, str(error), error
            else:
                reason = f"the arrays of {name} are others"
            if not same:
                raise OSError(
                    f"{self.folder / str(step)}: what was saved is not what is read again ({reason}); the disk, or its "
                    "file system, cannot be trusted: choose another --workdir"
                ) from cause

    def save_params(self, step: int, params: Any) -> None:
        """Saves weights that no training here has led to. Raises OSError in one line when it fails."""
        self._seal_later(step, None, self._write(step, {"params": params}), {})
        self.wait()

    def restore(self, abstract_state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole state and data position, laid out on the devices of `shardings`, whichever saved them.

        The weights of a base are not saved: `base` of the result is that of `abstract_state`.

        Raises ValueError, in one line, when there is none, or it cannot be read.
        """
        step = self.latest
        if step is None:
            raise ValueError(f"{self.folder} must hold a checkpoint; train first")
        manifest = self.manifest
        target = jax.tree_util.tree_map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        wanted = arrays_of(target)
        if not is_complete(manifest):
            wanted["training"].pop("losses")
        for name, tree in wanted.items():
            check_size(self.folder / str(step), manifest, name, num_bytes(tree))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        found = _restore(self._manager, step, ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        scale = target.scale and _restored_scale(target.scale, manifest)
        training = {"losses": jax.device_put(no_values(WINDOW), shardings.losses)} | dict(found.training)
        state = abstract_state.replace(params=found.params, ema_params=found.get("ema"), scale=scale, **training)
        data = dict(found.data)
        if is_complete(manifest) and (digests(arrays_of(state)) != manifest["arrays"] or data != manifest["data"]):
            raise ValueError(f"{self.folder / str(step)}: what is read is not what was saved; remove that folder")
        return state, data

    def give_up(self, step: int) -> int:
        """Sets checkpoints aside from `step` on, which no training can go on from; returns the newest before, or 0."""
        self.wait()
        for bad in [each for each in self._losses if each >= step]:
            if self._is_main:
                set_aside(self.folder, bad)
            del self._losses[bad]
            self._whole.discard(bad)
        for each in sorted(self._losses, reverse=True):
            with contextlib.suppress(ValueError):
                check_checkpoint(self.folder, each)
                self._whole.add(each)
                break
        return self.latest or 0

    def wait(self) -> None:
        """Until the save under way is on disk. Raises OSError in one line if it failed."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            with self._written():
                sealing.result()

    def poll(self) -> None:
        """Raises OSError in one line if the save under way has failed by now; does not wait for it."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises what its writers hit: OSError, ValueError, tensorstore's own
            cause = _cause(error, self.folder, self._saving_bytes)
            self._ahead.stop()
            self._losses = {step: loss for step, loss in self._losses.items() if step in read_manifests(self.folder)}
            for entry in leftovers(self.folder) if self._is_main else ():
                shutil.rmtree(entry, ignore_errors=True)
            raise OSError(
                f"{self.folder}: the checkpoint could not be written ({cause}); those before it are whole"
            ) from error

    def close(self) -> None:
        """Finishes the save under way and lets go of what is no longer kept."""
        try:
            self.wait()
            self._prune()
        finally:
            self._manager.close()
            self._sealer.shutdown()
            self._names.close()

    def _prune(self) -> None:
        steps = sorted(self._losses)
        best = _best_step(self._losses)
        for step in steps[: -self.keep]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                if self._is_main:
                    _remove(self.folder, step)
                del self._losses[step]
                self._whole.discard(step)


class SavedParams:
    """The weights in the checkpoints of a workdir, to be read beside a training; a context manager.

    Attributes:
      steps: those whose manifest is whole, in order; what it names is checked when it is read.
      manifests: by step.
      faults: step → what is wrong with it, of those that are not among the steps.
      folder: where they lie.
    """

    def __init__(self, workdir: Path):
        self.folder = Path(workdir).absolute() / "checkpoints"
        if self.folder.is_symlink():
            check_inside(self.folder.parent, self.folder)
        self.manifests, self.faults = read_manifests(self.folder), {}
        for step in unsealed(self.folder):
            if is_of_before(self.folder, step):
                self.manifests[step] = facts_of_before(self.folder, step)
                notice(f"checkpoint {step} has no digests, as earlier versions wrote it; it is taken as it is")
            elif step != _begun(self.folder):  # by a run that goes on at this moment, perhaps
                self.faults[step] = fault(self.folder, step)
        self.steps = sorted(self.manifests)
        for step, why in self.faults.items() if self.steps else ():  # else that is the reason to stop, of one line
            notice(f"checkpoint {step} is not used: {why}")

    def __enter__(self) -> "SavedParams":
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        self._names = _PlainPath(self.folder)
        self._manager = ocp.CheckpointManager(self._names.path, options=options)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
        self._names.close()

    def by_loss(self) -> list[int]:
        """The steps from the lowest validation loss on, then those without one from the newest on."""
        losses = {step: manifest.get(LOSS) for step, manifest in self.manifests.items()}
        known = sorted((loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
        by_loss = [-step for _, step in known]
        return by_loss + [step for step in reversed(self.steps) if step not in by_loss]

    def is_there(self, step: int) -> bool:
        """Whether the run has not let go of a checkpoint since."""
        return (self.folder / str(step)).is_dir()

    def has_ema(self, step: int) -> bool:
        """Whether the moving average of the weights was saved at that step."""
        files = self.manifests[step].get("files")
        folder = self.folder / str(step) / "ema"
        return folder.is_dir() if files is None else any(name.startswith("ema/") for name in files)

    def check(self, step: int, ema: bool = False) -> None:
        """Raises ValueError, in a few words, when the weights of a step are not whole."""
        if "files" in self.manifests[step]:
            check_checkpoint(self.folder, step, only={"ema" if ema else "params", "_CHECKPOINT_METADATA"})

    def load(self, steps: Sequence[int], abstract_params: Any, ema: bool = False) -> Any:
        """The mean of the weights of these steps (or of their moving average), of the shapes and shardings given."""
        item = "ema" if ema else "params"
        wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract_params)})

        def load_one(step: int) -> Any:
            check_size(self.folder / str(step), self.manifests[step], item, num_bytes(abstract_params))
            params = _restore(self._manager, step, wanted)[item]
            saved = self.manifests[step].get("arrays", {})
            if saved and not digests({item: params}).items() <= saved.items():
                raise ValueError(f"{self.folder / str(step)}: what is read is not what was saved; remove that folder")
            return params

        return mean_of_trees(map(load_one, steps))


def mean_of_trees(trees: Iterable[Any]) -> Any:
    """The mean of trees of weights, of which two at a time are in memory."""
    total, count = None, 0
    for tree in trees:
        total, count = tree if total is None else jax.tree_util.tree_map(jnp.add, total, tree), count + 1
    return total if count == 1 else jax.tree_util.tree_map(lambda x: x / count, total)


def saved_steps(folder: Path) -> list[int]:
    """Of the folders in `folder` that are named as checkpoints are."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii() and str(int(name[:19])) == name)


def read_manifests(folder: Path) -> dict[int, dict[str, Any]]:
    """Step → manifest, of each checkpoint in `folder` whose manifest is whole and of that step; files are not read."""
    found = {}
    for step in saved_steps(folder):
        with contextlib.suppress(ValueError):
            found[step] = _manifest_of(folder, step)
    return found


def unsealed(folder: Path) -> list[int]:
    """The steps in `folder` without a whole manifest of that step."""
    return sorted(set(saved_steps(folder)) - set(read_manifests(folder)))


def _manifest_of(folder: Path, step: int) -> dict[str, Any]:
    if (folder / str(step)).is_symlink():
        raise ValueError("it is a link, and must be the folder itself")
    manifest = read_manifest(folder / str(step))
    if manifest.get("step") != step:
        raise ValueError(f"its manifest is of step {manifest.get('step')}")
    if not isinstance(manifest.get(LOSS), int | float | None) or not isinstance(manifest.get("arrays", {}), dict):
        raise ValueError("its manifest has values that cannot be")
    return manifest


def check_checkpoint(folder: Path, step: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of a step, when all files (or those of the items in `only`) are as they were written.

    Raises ValueError, in a few words, with what is wrong.
    """
    manifest = _manifest_of(folder, step)
    check_manifest(folder / str(step), only)
    return manifest


def fault(folder: Path, step: int) -> str:
    """What is wrong with the manifest of a step, in a few words; "" where it is whole."""
    try:
        _manifest_of(folder, step)
    except ValueError as error:
        return str(error)
    return ""


def is_of_before(folder: Path, step: int) -> bool:
    """Whether a checkpoint is of the layout from before there were manifests, which had the item `meta`."""
    path = folder / str(step)
    is_linked = path.is_symlink() or any((path / name).is_symlink() for name in files_below(path))
    return (path / "meta" / "metadata").is_file() and not (path / MANIFEST).exists() and not is_linked


def facts_of_before(folder: Path, step: int) -> dict[str, Any]:
    """What the item `meta` of such a checkpoint says: its step, its loss and the scale of the loss."""
    try:
        path = folder / str(step) / "meta" / "metadata"
        check_inside(folder, path, 1 << 16)
        meta = json.loads(path.read_bytes())
        loss = meta.get(LOSS)
        facts = {"step": step, LOSS: float(loss) if isinstance(loss, int | float) else None}
        return facts | ({"loss_scale": meta["loss_scale"]} if "loss_scale" in meta else {})
    except (ValueError, AttributeError, RecursionError):  # damaged: then neither is known
        return {"step": step, LOSS: None}


def is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has what its manifest's version saves, and not only what versions before did."""
    return "arrays" in manifest


def _begun(folder: Path) -> int | None:
    """The step whose save was under way when its process ended, None where none was."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / BEGUN).read_text()[:20])
    return None


def _remove(folder: Path, step: int) -> None:
    """Removes a checkpoint, by a name that nobody reads: a reader finds all of it or none."""
    doomed = folder / f"{step}.orbax-checkpoint-tmp-deleted"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder / str(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path, step: int) -> Path:
    """Moves a checkpoint that cannot be believed to `workdir/damaged/`, out of the way of the step to come."""
    target = folder.parent / DAMAGED
    target.mkdir(exist_ok=True)
    place = next(p for n in range(1000) if not (p := target / (f"{step}" if not n else f"{step}-{n}")).exists())
    os.replace(folder / str(step), place)
    return place


def leftovers(folder: Path) -> list[Path]:
    """What a kill left half-written among the checkpoints: folders without their last name."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if ".orbax-checkpoint-tmp" in entry.name and not entry.is_symlink())


class _PlainPath:
    """A path for orbax, which takes some characters of a path for a pattern: there a link of a plain name."""

    def __init__(self, folder: Path):
        self.path, self._link = folder, None
        if set(str(folder)) & set("*?[]") or not str(folder).isprintable():
            self._link = tempfile.TemporaryDirectory(prefix="tale_jax-")
            folder.mkdir(parents=True, exist_ok=True)
            self.path = Path(self._link.name) / "checkpoints"
            self.path.symlink_to(folder, target_is_directory=True)

    def close(self) -> None:
        if self._link is not None:
            self._link.cleanup()


def digests(tree: Any) -> dict[str, str]:
    """Dotted name → a sum over the bits of each array, whatever its layout on devices: equal arrays have equal ones."""
    return {name: digest for name, (digest, _) in _named(_array_sums(tree)).items()}


def _named(sums: Any) -> dict[str, tuple[str, bool]]:
    """Dotted name → the digest of an array, and whether all its numbers are finite."""
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(sums))[0]
    return {".".join(_key_name(key) for key in path): (f"{int(found[0]):08x}", bool(found[1])) for path, found in paths}


def _array_sums(tree: Any) -> Any:
    """Of each array by itself: in one program for all XLA holds whatever it computes from them at the same time."""
    return jax.tree_util.tree_map(_sums_of_array, tree)


@jax.jit
def _sums_of_array(x: Any) -> Any:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x.astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):  # not by a reshape, which would gather an array that devices share
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % (1 << 32))
        stride *= x.shape[axis]
    digest = jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)  # odd: keeps every bit, and tells places apart
    return jnp.stack([digest, jnp.isfinite(x).all().astype(jnp.uint32)])


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def save_params(workdir: Path, step: int, params: Any, facts: Mapping[str, Any]) -> None:
    """Writes weights alone as the checkpoint of a step: of a model that was trained elsewhere, to be read.

    `facts` of the model go into its manifest, in JSON's types. Raises OSError in one line when it fails.
    """
    throttle = max_concurrent_bytes(params, overlap_io=False)
    checkpoints = Checkpoints(workdir, keep=1, max_concurrent_bytes=throttle, facts=facts)
    checkpoints.save_params(step, params)
    checkpoints.close()


def arrays_of(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by the items they are saved in."""
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key, "losses": state.losses},
    }
    return items if state.ema_params is None else items | {"ema": state.ema_params}


def _best_step(losses: Mapping[int, float | None]) -> int | None:
    """The step of the lowest loss, None when none is known."""
    known = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return min(known)[1] if known else None


def max_concurrent_bytes(state: Any, overlap_io: bool) -> int:
    """For `Checkpoints`: enough to keep a disk busy, and more than the largest array of `state`, as orbax demands.

    0, no limit, where writing overlaps with the steps.
    """
    if overlap_io:
        return 0
    return max(32 << 20, 2 * max(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(state)))


def item_handlers(max_concurrent_bytes: int) -> dict[str, Any] | None:
    """orbax's handlers of the items of a checkpoint; None, for its own, where nothing limits the bytes."""
    if not max_concurrent_bytes:
        return None
    gigabytes: Any = max_concurrent_bytes / 1e9  # orbax says int, and multiplies
    arrays = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes) for name in ARRAY_ITEMS}
    return arrays | {"data": ocp.JsonCheckpointHandler()}


def _saved_scale(scale: LossScale | None) -> dict[str, Any]:
    return {"loss_scale": [float(scale.value), int(scale.good)]} if scale else {}


def _restored_scale(target: LossScale, manifest: Mapping[str, Any]) -> LossScale:
    """The loss scale that was saved, or the first one where the run did not compute in float16 before."""
    first = first_scale()
    value, good = manifest.get("loss_scale", (first.value, first.good))
    scale = LossScale(jnp.asarray(value, jnp.float32), jnp.asarray(good, jnp.int32))
    return jax.tree_util.tree_map(lambda x, like: jax.device_put(x, like.sharding), scale, target)


def _restore(manager: ocp.CheckpointManager, step: int, args: Any) -> Any:
    folder = os.path.join(manager.directory, str(step))
    try:
        return manager.restore(step, args=args)
    except Exception as error:  # the files are whole, so it is their shapes that do not fit, or this orbax
        raise ValueError(f"{folder} is not a checkpoint that can be read ({_reason(error)})") from error


def num_bytes(tree: Any) -> int:
    """Of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))


def _check_space(folder: Path, size: int) -> None:
    """Raises OSError before a save that cannot fit; orbax would find out in the middle."""
    if (free := shutil.disk_usage(folder).free) < size:
        text = f"{format_bytes(size)} are needed and {format_bytes(free)} are free: {CAUSES[errno.ENOSPC]}"
        raise OSError(errno.ENOSPC, text, str(folder))


def check_size(folder: Path, manifest: Mapping[str, Any], item: str, size: int) -> None:
    """Raises ValueError, before anything is allocated, when files are too small for the arrays they should hold."""
    sizes = [(folder / name).lstat().st_size for name in files_below(folder) if name.startswith(f"{item}/")]
    if manifest and size > MAX_COMPRESSION * sum(sizes) + (1 << 20):
        raise ValueError(
            f"{folder} holds {format_bytes(sum(sizes))} of {item}, too little for the {format_bytes(size)} "
            "that config.json asks for; restore the one that belongs to it"
        )


CAUSES = {
    errno.ENOSPC: "the disk is full; make room, or keep fewer with --config.checkpoint.keep=1",
    errno.EDQUOT: "the disk quota is used up; make room, or keep fewer with --config.checkpoint.keep=1",
    errno.EACCES: "no permission to write there; give it back with chmod",
    errno.EPERM: "writing is not permitted there",
    errno.EROFS: "the file system is read-only; mount it for writing",
    errno.EIO: "the disk has an I/O error; save to another one",
    errno.ENOENT: "the folder was removed",
}


def _cause(error: BaseException, folder: Path, size: int) -> str:
    """Why a save failed, by errno: of the error or what it came from, else of as much written just now."""
    for known in (*_chain(error), *_probe(folder, size)):
        if isinstance(known, OSError) and known.errno in CAUSES:
            said = known.strerror or ""
            return said if CAUSES[known.errno] in said else CAUSES[known.errno]  # with sizes, where they are known
    return _reason(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _probe(folder: Path, size: int) -> list[OSError]:
    """The error of writing so many bytes there, [] where it works: libraries tell some errors in words alone."""
    path = folder / ".probe.orbax-checkpoint-tmp"
    try:
        with path.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return [error]
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return []


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
