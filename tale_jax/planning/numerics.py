"""Is a dtype numerically correct on this machine, and how fast? Checked in another process, since old plugins abort.

For each dtype a tiny model takes one training step, with the `Trainer.step` of a run (Muon and our own gradients
included), and decodes one token. Loss, gradients, updated weights and logits are compared with float32 on the CPU. Then
training steps are timed. The result is kept in the user's cache folder, for this machine and these versions.

    python -m tale_jax.planning.numerics cpu bfloat16        # prints one JSON object as its last line
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax.config import Config, change
from tale_jax.hardware import machine
from tale_jax.hardware.backend import Backend, for_platform, matmul_peak, start_backend
from tale_jax.model.decoding import Cache
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.planning.timing import random_windows, timed_step
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.subprocesses import run_module

DTYPES = ("float32", "bfloat16", "float16")
MAX_ERROR = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}  # relative error of loss and logits
# What other results may differ by, as a multiple of that: an update by Muon is a product of products.
ERROR_FACTORS = {"loss": 1, "gradient": 3, "update": 6, "decode": 1}
MIN_BFLOAT16_SPEEDUP = 1.3  # of large products on a CPU: they are not all of a step
FLOAT32_PREFERENCE = 1.1  # float32 is taken where nothing else is faster by more than this
MAX_LOSS_SCALE_STEPS = 12  # float16 skips steps until its loss scale fits
TIMEOUT = 300  # seconds
CHECK_VERSION = 3  # of what is computed and compared: cached results of another version do not count
CHECKED_CONFIG = change(
    Config.build(dataclasses.asdict(Config())),
    {
        "total_steps": 100,
        "batch_size": 4,
        "micro_batch_size": 4,
        "tokenizer.vocab_size": 512,
        "model.num_layers": 2,
        "model.embed_dim": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 0,
        "model.mlp_dim": 192,
        "model.seq_len": 64,
        "model.zero_init_outputs": False,  # else half of the gradients of a first step are 0
        "optimizer.name": "muon",
        "optimizer.normuon_beta": 0.95,
        "optimizer.clip_norm": 0.0,  # momentum after the first step is then the gradient, times a constant
    },
).with_total_steps()
TIMED_CONFIG = change(
    CHECKED_CONFIG,
    {
        "model.embed_dim": 384,
        "model.num_heads": 6,
        "model.num_kv_heads": 6,
        "model.head_dim": 0,
        "model.mlp_dim": 1024,
        "model.seq_len": 256,
    },
)


@dataclasses.dataclass(frozen=True)
class DtypeCheck:
    """Whether one dtype is numerically correct, and how fast it is.

    Attributes:
      dtype: float32, bfloat16 or float16.
      correct: whether it ran, and no error was larger than MAX_ERROR and ERROR_FACTORS allow.
      reason: what went wrong, "" if nothing did.
      loss_error, gradient_error, update_error, decode_error: relative to float32 on the CPU.
      tokens_per_second: of training steps of a small model.
    """

    dtype: str
    correct: bool
    reason: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    update_error: float | None = None
    decode_error: float | None = None
    tokens_per_second: float | int = 0.0


def choose_precision(backend: Backend, precision: str) -> tuple[Any, str]:
    """The dtype to compute in, and the reason. `precision` is auto or a dtype; auto takes the fastest correct one.

    float32 is preferred when it is nearly as fast. A CPU is the reference for all others, so there nothing is checked:
    large products are timed, in less than a second. Raises ValueError for a dtype that is not numerically correct here.
    """
    if backend.platform == "cpu":
        if precision != "auto":
            return jnp.dtype(precision), "as the config says"
        # No CPU that we know of is faster in float16 than in bfloat16.
        peaks = {name: matmul_peak(name) for name in ("float32", "bfloat16")}
        dtype = "bfloat16" if peaks["bfloat16"] > MIN_BFLOAT16_SPEEDUP * peaks["float32"] else "float32"
        shown = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
        return jnp.dtype(dtype), f"matrix products here: {shown}"
    checks = {check.dtype: check for check in check_dtypes(backend)}
    correct = [check for check in checks.values() if check.correct]
    if precision != "auto":
        if not checks[precision].correct:
            alternative = f"--config.precision={correct[0].dtype}" if correct else "--config.backend.platform=cpu"
            raise ValueError(
                f"precision={precision} must be numerically correct on {backend.platform}, but is not "
                f"({checks[precision].reason}); try {alternative}"
            )
        return jnp.dtype(precision), "as the config says; numerically correct here"
    if not correct:
        reasons = "; ".join(f"{check.dtype}: {check.reason}" for check in checks.values())
        raise ValueError(
            f"precision=auto finds no dtype that is numerically correct on {backend.platform} ({reasons}); "
            "try --config.backend.platform=cpu"
        )
    preference = {"float32": FLOAT32_PREFERENCE}
    best = max(correct, key=lambda check: check.tokens_per_second * preference.get(check.dtype, 1.0))
    rates = ", ".join(f"{check.dtype} {check.tokens_per_second:,.0f}" for check in correct)
    wrong = "".join(f"; {check.dtype} is not correct: {check.reason}" for check in checks.values() if not check.correct)
    return jnp.dtype(best.dtype), f"the fastest correct dtype, by tokens/s of a small model: {rates}{wrong}"


def check_dtypes(
    backend: Backend, fresh: bool = False, tell: Callable[[str], None] = lambda what: None
) -> list[DtypeCheck]:
    """The check of each dtype on the platform of `backend`, from the cache unless `fresh`.

    `tell` is called with what is checked next.
    """
    file = _file_of_checks(backend)
    if file and not fresh:
        with suppress(ValueError, TypeError, OSError):  # none, damaged, or of another version: check again
            return [DtypeCheck(**check) for check in json.loads(file.read_text())]
    checks = []
    for dtype in DTYPES:
        tell(f"checking {dtype}")
        checks.append(_check_in_subprocess(backend.platform, dtype))
    machine.keep(file, json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    return checks


def time_of_kept_checks(backend: Backend) -> float:
    """Unix time when the checks that the cache has were made; 0 where it has none."""
    with suppress(OSError):
        if file := _file_of_checks(backend):
            return file.stat().st_mtime
    return 0.0


def _file_of_checks(backend: Backend) -> Path | None:
    return machine.cache_file("dtypes", f"{_fingerprint(backend)}.json")


def _fingerprint(backend: Backend) -> str:
    versions = [machine.version(name) for name in ("jax", "jaxlib", "flax", "numpy", backend.plugin or "jax")]
    facts = [backend.platform, backend.device, len(backend.devices), backend.plugin, sys.version, *versions]
    rules = [MAX_ERROR, ERROR_FACTORS, CHECK_VERSION]
    return hashlib.sha256(json.dumps([*facts, *rules]).encode()).hexdigest()[:16]


def _check_in_subprocess(platform: str, dtype: str) -> DtypeCheck:
    result = run_module("tale_jax.planning.numerics", platform, dtype, timeout=TIMEOUT)
    if result.reason:
        return DtypeCheck(dtype, False, f"the check ended with {result.reason}")
    return DtypeCheck(**result.json())


def check_dtype(backend: Backend, dtype: str) -> DtypeCheck:
    """The check of `dtype` on the first device of `backend`, in this process."""
    cpu = dataclasses.replace(for_platform(backend, "cpu"), devices=(jax.devices("cpu")[0],), donate=False)
    cpu = dataclasses.replace(cpu, materialize_transposes=False, cudnn_attention=False)  # the simplest products
    backend = dataclasses.replace(backend, devices=backend.devices[:1])
    initial = jax.device_get(make_trainer(CHECKED_CONFIG, cpu, jnp.float32, UntrainedTokenizer.bos_id).init())
    reference = _compute(cpu, "float32", initial)
    computed = _compute(backend, dtype, initial)
    errors = {name: _relative_error(computed[name], reference[name]) for name in reference}
    # `all` of comparisons with <=, which are False for NaN.
    correct = all(error <= MAX_ERROR[dtype] * ERROR_FACTORS[name] for name, error in errors.items())
    reason = "" if correct else "relative errors: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items())
    finite = {f"{name}_error": error if np.isfinite(error) else None for name, error in errors.items()}
    return DtypeCheck(dtype, correct, reason, **finite, tokens_per_second=_tokens_per_second(backend, dtype))


def _compute(backend: Backend, dtype: str, initial: TrainState) -> dict[str, np.ndarray]:
    """Loss, gradients and updates of all weights in a training step, and logits after a decoded token."""
    trainer = make_trainer(CHECKED_CONFIG, backend, jnp.dtype(dtype), UntrainedTokenizer.bos_id)
    state = _with_loss_scale(trainer, initial)
    windows = trainer.place(random_windows(CHECKED_CONFIG))
    state, metrics = trainer.step(jax.device_put(state, trainer.state_shardings), windows)
    for _ in range(MAX_LOSS_SCALE_STEPS):
        if np.isfinite(float(metrics["grad_norm"])):
            break
        state, metrics = trainer.step(state, windows)
    update = jax.tree_util.tree_map(lambda new, old: np.asarray(new) - old, state.params, initial.params)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if _is_momentum(path)]
    return {
        "loss": np.asarray(metrics["loss"], np.float32),
        "gradient": _concatenate(moments),
        "update": _concatenate(jax.tree_util.tree_leaves(update)),
        "decode": _decoded_logits(trainer, jax.device_put(initial.params, backend.devices[0])),
    }


def _with_loss_scale(trainer: Trainer, initial: TrainState) -> TrainState:
    """The initial state with the loss scale that float16 needs."""
    if trainer.abstract_state.scale is None:
        return initial.replace(scale=None)
    return initial.replace(scale=jax.device_get(trainer.init().scale))


def _is_momentum(path: tuple) -> bool:
    """Whether this is the path of a first moment, which after one step is the gradient, times a constant."""
    return any(getattr(key, "name", "") in ("mu", "momentum") for key in path)


def _decoded_logits(trainer: Trainer, params: Any) -> np.ndarray:
    model = trainer.model
    tokens = random_windows(CHECKED_CONFIG)[:, :16]

    def decode(params: Any, tokens: Any) -> Any:
        cache = Cache.empty(CHECKED_CONFIG.model, tokens.shape[0], model.dtype)
        prefilled: Any = model.apply({"params": params}, tokens[:, :-1], cache=cache)
        decoded: Any = model.apply({"params": params}, tokens[:, -1:], cache=prefilled[1])
        return decoded[0].astype(jnp.float32)

    return np.asarray(jax.jit(decode)(params, tokens))


def _concatenate(leaves: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])


def _relative_error(computed: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(computed - reference) / np.linalg.norm(reference))


def _tokens_per_second(backend: Backend, dtype: str, seconds: float = 2.0) -> float:
    trainer = make_trainer(TIMED_CONFIG, backend, jnp.dtype(dtype), UntrainedTokenizer.bos_id)
    state, windows = trainer.init(), trainer.place(random_windows(TIMED_CONFIG))
    state, _, _ = timed_step(trainer, state, windows)  # compiles
    best, end_time = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end_time:
        state, _, step_seconds = timed_step(trainer, state, windows)
        best = min(best, step_seconds)
    return TIMED_CONFIG.tokens_per_step / best


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(check_dtype(start_backend(sys.argv[1]), sys.argv[2]))))
