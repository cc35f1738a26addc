"""A workdir opened: the one path by which a trained model is restored, for evaluation, sampling and conversion.

experiment = open_experiment(Path("experiments/tales"), start_backend("auto"))
sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax.config import Config
from tale_jax.data.prepare import BASE_FILE, BASE_FOLDER, base_folder, load_tokenizer, read_base_file
from tale_jax.data.token_files import Manifest
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.hardware.distributed import is_main_process
from tale_jax.model.adapters import Adapted, init_adapters, merged
from tale_jax.model.transformer import Kernels, Transformer, make_model
from tale_jax.planning.autotune import num_weights
from tale_jax.training.checkpoint import SavedParams, check_size
from tale_jax.utils.files import write_atomically
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import notice

MAX_TRIES = 5  # to read a checkpoint beside a run that lets go of old ones


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A trained model, its tokenizer and its settings.

    `weights` says what `params` are: last (as `step` left them), ema (their moving average), or mean:K (the mean of the
    K checkpoints up to `step`). Where adapters of a base were trained, they are merged into `params`, and `adapted` has
    both apart. `windows` are digests of the token windows that it was trained beside, by split; none where an earlier
    version saved it. `earlier_step`: of the newest checkpoint before this one, 0 where there is none.
    """

    workdir: Path
    config: Config
    step: int
    weights: str
    tokenizer: Tokenizer
    model: Transformer
    params: Any
    adapted: Adapted | None = None
    windows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    earlier_step: int = 0

    def check_windows(self, manifest: Manifest) -> None:
        """Raises ValueError, in one line, when a split is not the one that this model was trained beside."""
        check_windows(f"checkpoint {self.step} of {self.workdir}", self.windows, manifest)


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
    workdir = Path(workdir)
    for _ in range(MAX_TRIES):
        saved = SavedParams(workdir)
        try:
            return _open(workdir, saved, backend, step, dtype, weights)
        except (ValueError, OSError):
            if all(map(saved.is_there, saved.steps)):
                raise
        # A run beside this one has let go of a checkpoint meanwhile: it is chosen anew.
    return _open(workdir, SavedParams(workdir), backend, step, dtype, weights)


def _open(workdir: Path, saved: SavedParams, backend: Kernels, step: int, dtype: Any, weights: str) -> Experiment:
    config, count = Config.load(workdir), _count_of_mean(weights)
    if not saved.steps:
        why = ", ".join(f"{step}: {fault}" for step, fault in saved.faults.items()) or "none"
        raise ValueError(
            f"workdir={workdir} must hold a checkpoint that is whole (in {saved.folder}: {why}); train first with "
            "launch/train.py"
        )
    if step and step not in saved.steps:
        there, fault = ", ".join(map(str, saved.steps)), saved.faults.get(step)
        reason = f" ({fault})" if fault else ""
        raise ValueError(f"step={step} must be a whole checkpoint of {saved.folder}{reason}; there is {there}")
    tokenizer = load_tokenizer(workdir)
    with Progress("restoring the weights", every_seconds=math.inf), saved:
        chosen = _choose(saved, step, count, weights)
        kind = weights if weights != "auto" else "ema" if saved.has_ema(chosen[-1]) else "last"
        manifest = saved.manifests[chosen[-1]]
        check_belongs(f"checkpoint {chosen[-1]} of {workdir}", manifest, config, tokenizer)
        # Before a model of absurd size is described.
        check_saved_size(saved.folder / str(chosen[-1]), manifest, config)
        base = open_base(workdir, config, backend, manifest.get("base", "")).params if config.lora.rank else None
        model = make_model(dataclasses.replace(config, remat="none"), backend, dtype)
        shapes = _abstract_params(model)
        if config.lora.rank:
            shapes = _on_default_device(
                jax.eval_shape(lambda tree: init_adapters(tree, config.lora, jax.random.PRNGKey(0)), shapes)
            )
        params = saved.load(chosen, shapes, ema=kind == "ema")
    if not step and not count and saved.steps[-1] != chosen[-1] == saved.by_loss()[0]:
        notice(f"checkpoint of step {chosen[-1]}, the best by validation loss; the last is of step {saved.steps[-1]}")
    adapted = Adapted(base, params, config.lora.scale) if config.lora.rank else None
    facts = (manifest.get("windows", {}), max((each for each in saved.steps if each < chosen[0]), default=0))
    return Experiment(workdir, config, chosen[-1], kind, tokenizer, model, merged(adapted or params), adapted, *facts)


def open_base(workdir: Path, config: Config, backend: Kernels, digest: str = "") -> Experiment:
    """The base of a workdir, in float32: the one whose digest `base.json` has, which is written where it is missing.

    `digest`: of the base that a checkpoint says it was trained on; "" where there is none, or it says nothing.

    Raises ValueError, in one line, when it is not there or is another one.
    """
    folder, file = base_folder(workdir, config.base), Path(workdir) / BASE_FILE
    if folder.resolve() == Path(workdir).resolve():
        raise ValueError(f"base={config.base} must not be the workdir itself; give another --workdir")
    known = read_base_file(workdir)
    move = f"copy or link it to {Path(workdir) / BASE_FOLDER}"
    if not (folder / "config.json").is_file():
        remedy = move if known else "give a workdir or a Hugging Face folder"
        raise ValueError(f"base={config.base} must hold a model (no config.json there); {remedy}")
    base = open_experiment(folder, backend, known.get("step", 0), weights=known.get("weights", "auto"))
    found = weights_digest(base.params)
    for wanted in filter(None, (digest, known.get("digest"))):
        if wanted != found:
            raise ValueError(
                f"base={folder} must be the model of digest {wanted[:12]} that {workdir} was trained on, and has "
                f"{found[:12]}; if you have that one, {move}"
            )
    if not known:
        known = {"path": str(folder.resolve()), "step": base.step, "weights": base.weights, "digest": found}
        if is_main_process():
            write_atomically(file, json.dumps(known, indent=2) + "\n")
    return base


def weights_digest(params: Any) -> str:
    """A digest of weights: of their names, shapes and values."""
    digest = hashlib.blake2b(digest_size=32)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def check_saved_size(folder: Path, manifest: Mapping[str, Any], config: Config) -> None:
    """Raises ValueError, in one line, when a checkpoint is too small for the weights (not for adapters)."""
    if not config.lora.rank:
        check_size(folder, manifest, "params", 4 * num_weights(config))


def run_facts(config: Config, tokenizer: Tokenizer, windows: Mapping[str, Manifest], precision: str) -> dict[str, Any]:
    """What ties a checkpoint to its run, for its manifest: the settings, and digests of tokenizer and windows."""
    digests = {split: manifest.sha256 for split, manifest in windows.items()}
    return {
        "settings": config.to_json(),
        "tokenizer": tokenizer.fingerprint,
        "windows": digests,
        "precision": precision,
    }


def check_belongs(what: str, manifest: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> None:
    """Raises ValueError, in one line, when a checkpoint is of other settings or another tokenizer than the workdir.

    A checkpoint of an earlier version may not say what it is of.
    """
    if "settings" in manifest and (other := config.difference(Config.from_json(manifest["settings"], what))):
        name, mine, theirs = other
        raise ValueError(
            f"{name}={json.dumps(mine)} must be {json.dumps(theirs)}, as in {what}; restore config.json from a copy, "
            "or give another --workdir"
        )
    is_same = manifest.get("tokenizer", tokenizer.fingerprint) == tokenizer.fingerprint
    if not is_same or tokenizer.vocab_size > config.tokenizer.vocab_size:
        raise ValueError(f"{what} belongs to another tokenizer than the one in the workdir; restore that from a copy")


def check_windows(what: str, trained_beside: Mapping[str, str], manifest: Manifest) -> None:
    """Raises ValueError, in one line, when a split is not the one that a checkpoint was trained beside, nor has taken
    its place (`corpus.changed`)."""
    wanted = trained_beside.get(manifest.split, "")
    if wanted and manifest.sha256 and wanted not in manifest.known_as:
        raise ValueError(
            f"{what} belongs to other {manifest.split} windows than those in the workdir; restore windows from a copy, "
            "or train in a new workdir"
        )


def _choose(saved: SavedParams, step: int, count: int, weights: str) -> list[int]:
    """The steps to read, in order: the one asked for, or the best whose files are whole; for mean:K the newest K."""
    candidates = [step] if step else list(reversed(saved.steps)) if count else saved.by_loss()
    whole: list[int] = []
    for candidate in candidates if not (step and count) else [s for s in reversed(saved.steps) if s <= step]:
        has_ema = saved.has_ema(candidate)
        if weights == "ema" and not has_ema:
            raise _not_kept(weights, count, candidate, saved)
        try:
            saved.check(candidate, ema=has_ema and weights in ("auto", "ema"))
        except ValueError as error:
            if candidate == step:
                others = [s for s in saved.steps if s != step]
                remedy = f"try --step={others[-1]}" if others else "restore it from a copy"
                raise ValueError(f"checkpoint {step} of {saved.folder} is damaged: {error}; {remedy}") from None
            if saved.is_there(candidate):
                notice(f"checkpoint {candidate} is not used: {error}")
            continue
        whole.append(candidate)
        if len(whole) == max(1, count):
            return sorted(whole)
    if count and whole:
        raise _not_kept(weights, count, whole[0], saved)
    raise ValueError(
        f"{saved.folder} must hold a checkpoint that is whole, and each is damaged; restore one from a copy"
    )


def _not_kept(weights: str, count: int, step: int, saved: SavedParams) -> ValueError:
    up_to = f" of the {len([s for s in saved.steps if s <= step])} checkpoints up to step {step}" if count else ""
    kept = f"{'ema, ' if saved.has_ema(step) else ''}last, and mean:K{up_to}"
    return ValueError(f"weights={weights} must be what the run kept; there is {kept}")


def _abstract_params(model: Transformer) -> Any:
    """Shapes of the weights, on the default device."""
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return _on_default_device(shapes)


def _on_default_device(shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def _count_of_mean(weights: str) -> int:
    """K of mean:K, 0 for other weights. Raises ValueError, in one line, for weights that there never are."""
    if found := re.fullmatch(r"mean:([1-9]\d*)", weights):
        return int(found[1])
    if weights not in ("auto", "last", "ema"):
        raise ValueError(f"weights={weights} must be auto, last, ema, or mean:K of K checkpoints; try --weights=mean:2")
    return 0
