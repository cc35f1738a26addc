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
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tale_jax.training.ema import mean_of_trees
from tale_jax.training.loss_scale import LossScale, first_scale
from tale_jax.training.state import TrainState
from tale_jax.utils.format import format_bytes
from tale_jax.utils.manifests import check_manifest, read_manifest, write_manifest
from tale_jax.utils.progress import notice

LOSS = "nats_per_token"
ARRAY_ITEMS = ("params", "ema", "training")  # of these `ema` is in some checkpoints only
DAMAGED = "damaged"  # folder of the workdir for checkpoints that cannot be believed


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them stay, and the best by validation loss.

    Args:
      workdir: of the run.
      keep: how many stay.
      max_concurrent_bytes: bytes that are on their way to the disk at a time, while `save` waits; 0: `save` copies the
        state and returns, and the copy is written in the background.
      identity: what the run is, in JSON's types; it goes into each manifest, and a checkpoint of another is refused.
    """

    def __init__(
        self, workdir: Path, keep: int, max_concurrent_bytes: int = 0, identity: Mapping[str, Any] | None = None
    ):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.keep, self._identity = keep, dict(identity or {})
        self._is_main = jax.process_index() == 0
        if self._is_main:
            for entry in leftovers(self.folder):
                shutil.rmtree(entry, ignore_errors=True)
        self._overlaps = not max_concurrent_bytes
        options = ocp.CheckpointManagerOptions(create=True, max_to_keep=None, enable_async_checkpointing=self._overlaps)
        self._names = _PlainPath(self.folder)
        self._manager = ocp.CheckpointManager(
            self._names.path, options=options, item_handlers=_throttled_handlers(max_concurrent_bytes)
        )
        manifests = read_manifests(self.folder)
        self._losses: dict[int, float | None] = {step: manifest.get(LOSS) for step, manifest in manifests.items()}
        self._whole: set[int] = set()  # steps whose every file was found whole, or written, by this process
        self._sealing: Future[None] | None = None
        self._sealer = ThreadPoolExecutor(1)
        for step in sorted(set(self._manager.all_steps()) - set(manifests)):
            self._set_aside(step, _fault(self.folder, step))

    @property
    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, None where there is none. What is not whole is set aside."""
        for step in sorted(self._losses, reverse=True):
            if step in self._whole:
                return step
            try:
                check_checkpoint(self.folder, step)
            except ValueError as error:
                self._set_aside(step, str(error))
            else:
                self._whole.add(step)
                return step
        return None

    def _set_aside(self, step: int, fault: str) -> None:
        self._losses.pop(step, None)
        if self._is_main:
            place = set_aside(self.folder, step)
            notice(f"checkpoint {step} is not used: {fault}; it lies in {place} now")
        self._manager.reload()

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], loss: float | None) -> None:
        """Begins to save `state` and the data position; `loss` is the validation loss in nats per token, if known now.

        Raises:
          OSError: in one line, when this save, or the one before it, failed; the older ones are still there.
          ValueError: the state holds a number that is not finite; nothing is saved.
        """
        if step in self._losses:
            return
        self.wait()
        arrays = _arrays(state)
        if bad := _first_not_finite(arrays):
            raise ValueError(f"{bad} is not finite at step {step}, so nothing of it is saved")
        self._prune()
        facts = {"step": step, LOSS: loss, "arrays": digests(arrays), **self._identity} | _saved_scale(state.scale)
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}, data=ocp.args.JsonSave(dict(data))
        )
        with self._written():
            _check_space(self.folder, arrays)
            self._manager.save(step, args=items)
        self._losses[step] = loss
        self._sealing = self._sealer.submit(self._seal, step, facts)
        if not self._overlaps:
            self.wait()

    def _seal(self, step: int, facts: Mapping[str, Any]) -> None:
        """Waits until the arrays are on disk, and writes the manifest: from now on the checkpoint exists."""
        self._manager.wait_until_finished()
        if self._is_main:
            write_manifest(self.folder / str(step), facts)
        self._whole.add(step)

    def restore(self, abstract_state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole state and data position, laid out on the devices of `shardings`, whichever saved them.

        Raises ValueError, in one line, when there is none, or it is of another run.
        """
        step = self.latest
        if step is None:
            raise ValueError(f"{self.folder} must hold a checkpoint; train first")
        manifest = read_manifest(self.folder / str(step))
        check_identity(f"checkpoint {step}", manifest, self._identity)
        target = jax.tree_util.tree_map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _arrays(target).items()}
        found = _restore(self._manager, step, ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        scale = target.scale and _restored_scale(target.scale, manifest)
        state = TrainState(params=found.params, ema_params=found.get("ema"), scale=scale, **found.training)
        if digests(_arrays(state)) != manifest["arrays"]:
            raise ValueError(f"{self.folder / str(step)}: the arrays read are not those saved; remove that folder")
        return state, dict(found.data)

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
            self._losses = {step: loss for step, loss in self._losses.items() if step in read_manifests(self.folder)}
            raise OSError(
                f"{self.folder}: the checkpoint could not be written ({_cause(error, self.folder)})"
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
            if step != best:
                self._manager.delete(step)
                del self._losses[step]


class SavedParams:
    """The weights in the checkpoints of a workdir, to be read beside a training; a context manager.

    Attributes:
      steps: those whose manifest is whole, in order; what it names is checked when it is read.
      folder: where they lie.
    """

    def __init__(self, workdir: Path):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manifests = read_manifests(self.folder)
        self.steps = sorted(self._manifests)
        self._names, self._manager = _PlainPath(self.folder), None

    def __enter__(self) -> "SavedParams":
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        self._manager: Any = ocp.CheckpointManager(self._names.path, options=options)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
        self._names.close()

    def by_loss(self) -> list[int]:
        """The steps from the lowest validation loss on, then those without one from the newest on."""
        losses = {step: manifest.get(LOSS) for step, manifest in self._manifests.items()}
        known = sorted((loss, -step) for step, loss in losses.items() if loss is not None)
        return [-step for _, step in known] + [step for step in reversed(self.steps) if losses[step] is None]

    def manifest(self, step: int) -> dict[str, Any]:
        """What stands in the manifest of a step besides its files."""
        return self._manifests[step]

    def has_ema(self, step: int) -> bool:
        """Whether the moving average of the weights was saved at that step."""
        return any(name.startswith("ema/") for name in self._manifests[step]["files"])

    def check(self, step: int, ema: bool = False) -> None:
        """Raises ValueError, in a few words, when the weights of a step are not whole."""
        check_checkpoint(self.folder, step, only={"ema" if ema else "params", "_CHECKPOINT_METADATA"})

    def load(self, steps: Sequence[int], abstract_params: Any, ema: bool = False) -> Any:
        """The mean of the weights of these steps (or of their moving average), of the shapes and shardings given."""
        item = "ema" if ema else "params"
        wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract_params)})

        def load_one(step: int) -> Any:
            params = _restore(self._manager, step, wanted)[item]
            saved = {name: digest for name, digest in self._manifests[step]["arrays"].items() if name.startswith(item)}
            if digests({item: params}) != saved:
                raise ValueError(f"{self.folder / str(step)}: the arrays read are not those saved; remove that folder")
            return params

        return mean_of_trees(map(load_one, steps))


def read_manifests(folder: Path) -> dict[int, dict[str, Any]]:
    """Step → manifest, of each checkpoint in `folder` whose manifest is whole and of that step; files are not read."""
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.isdecimal() and entry.name.isascii() and len(entry.name) < 19 and not entry.is_symlink():
            with contextlib.suppress(ValueError):
                found[int(entry.name)] = _manifest_of(folder, int(entry.name))
    return found


def _manifest_of(folder: Path, step: int) -> dict[str, Any]:
    manifest = read_manifest(folder / str(step))
    if manifest.get("step") != step:
        raise ValueError(f"its manifest is of step {manifest.get('step')}")
    return manifest


def check_checkpoint(folder: Path, step: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of a step, when all files (or those of the items in `only`) are as they were written.

    Raises ValueError, in a few words, with what is wrong.
    """
    manifest = _manifest_of(folder, step)
    check_manifest(folder / str(step), only)
    return manifest


def _fault(folder: Path, step: int) -> str:
    try:
        _manifest_of(folder, step)
    except ValueError as error:
        return str(error)
    return ""


def check_identity(what: str, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line, with the first part of `identity` that differs in a manifest."""
    for name, value in identity.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"{what} belongs to another {name} than the one in the workdir; restore {name} from a copy, "
                "or train in a new workdir"
            )


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
    return sorted(entry for entry in entries if ".orbax-checkpoint-tmp" in entry.name)


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
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(_digest_arrays(tree)))[0]
    return {".".join(_key_name(key) for key in path): f"{int(value):08x}" for path, value in paths}


@jax.jit
def _digest_arrays(tree: Any) -> Any:
    def one(x: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x.astype(jnp.uint32)
        flat = bits.reshape(-1)
        odd = 2 * jax.lax.iota(jnp.uint32, flat.size) + 1  # an odd factor keeps every bit, and tells places apart
        return jnp.sum(flat * odd, dtype=jnp.uint32)

    return jax.tree_util.tree_map(one, tree)


@jax.jit
def _finite_arrays(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda x: jnp.isfinite(x).all(), tree)


def _first_not_finite(tree: Any) -> str:
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(_finite_arrays(tree)))[0]
    return next((".".join(_key_name(key) for key in path) for path, finite in paths if not finite), "")


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by the items they are saved in."""
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key, "guard": state.guard},
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


def _check_space(folder: Path, arrays: Any) -> None:
    """Raises OSError before a save that cannot fit; orbax would find out in the middle."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(arrays))
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(errno.ENOSPC, f"{format_bytes(size)} are needed and {format_bytes(free)} are free", str(folder))


CAUSES = {
    errno.ENOSPC: "the disk is full; make room, or keep fewer with --config.checkpoint.keep=1",
    errno.EDQUOT: "the disk quota is used up; make room, or keep fewer with --config.checkpoint.keep=1",
    errno.EACCES: "no permission to write there; give it back with chmod",
    errno.EPERM: "writing is not permitted there",
    errno.EROFS: "the file system is read-only; mount it for writing",
    errno.EIO: "the disk has an I/O error; save to another one",
    errno.ENOENT: "the folder was removed",
}


def _cause(error: BaseException, folder: Path) -> str:
    """Why a save failed, by errno: of the error or what it came from, else of a small file written just now."""
    for known in (*_chain(error), *_probe(folder)):
        if isinstance(known, OSError) and known.errno in CAUSES:
            return CAUSES[known.errno]
    return _reason(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _probe(folder: Path) -> list[OSError]:
    """The error of writing a megabyte there, [] where it works."""
    path = folder / ".probe"
    try:
        with path.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [error]
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return []


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
