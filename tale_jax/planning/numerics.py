"""Is a dtype numerically correct on this machine, and how fast? Checked in another process, since old plugins abort.

For each dtype a tiny model takes one training step, the very `Trainer.step` of a run with Muon and its own gradients,
and decodes one token; loss, gradients, updated weights and logits are compared with float32 on the CPU. Then training
steps are timed, each ended by a host read (on some plugins nothing else waits). The result is kept in the user's cache
folder for this machine and these versions.

    python -m tale_jax.planning.numerics cpu bfloat16        # what the process prints: one JSON object as its last line
"""

import dataclasses
import hashlib
import json
import sys
import time
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax.config import Config, change
from tale_jax.hardware import machine
from tale_jax.hardware.backend import Backend, matmul_peak, on_platform, start_backend
from tale_jax.model.transformer import Cache
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.files import write_atomically
from tale_jax.utils.subprocesses import run_module

DTYPES = ("float32", "bfloat16", "float16")
# Of the relative error of loss and logits; of gradients and updates three and six times that: an update by Muon is a
# product of products.
MAX_ERROR = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}
TIMEOUT = 300  # seconds
VOCAB_SIZE, BOS_ID = 512, 1
SMALL = change(
    Config.build(dataclasses.asdict(Config())),
    {
        "total_steps": 100,
        "batch_size": 4,
        "micro_batch_size": 4,
        "tokenizer.vocab_size": VOCAB_SIZE,
        "model.num_layers": 2,
        "model.embed_dim": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.mlp_dim": 192,
        "model.seq_len": 64,
        "model.zero_init_outputs": False,  # else half of the gradients of a first step are 0
        "optimizer.name": "muon",
        "optimizer.normuon_beta": 0.95,
        "optimizer.clip_norm": 0.0,  # momentum is then the gradient
    },
).with_total_steps()
TIMED = change(
    SMALL,
    {
        "model.embed_dim": 384,
        "model.num_heads": 6,
        "model.num_kv_heads": 6,
        "model.mlp_dim": 1024,
        "model.seq_len": 256,
    },
)
CHECK_VERSION = 2  # of what is compared: cached results of another version do not count


@dataclasses.dataclass(frozen=True)
class DtypeCheck:
    """What was found about one dtype.

    Attributes:
      dtype: float32, bfloat16 or float16.
      correct: it ran, and everything came within MAX_ERROR of float32 on the CPU.
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
    tokens_per_second: float = 0.0


def choose_precision(backend: Backend, precision: str) -> tuple[Any, str]:
    """The dtype to compute in, and the reason. `precision` is auto or a dtype; auto takes the fastest correct one.

    float32 wins when it is nearly as fast. A CPU is what others are compared with, so there large products are timed,
    in less than a second, and nothing is checked. Raises ValueError for a dtype that is not numerically correct here.
    """
    if backend.platform == "cpu":
        if precision != "auto":
            return jnp.dtype(precision), "as the config says"
        # No CPU that we know of is faster in float16 than in bfloat16.
        peaks = {name: matmul_peak(name) for name in ("float32", "bfloat16")}
        shown = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
        faster = peaks["bfloat16"] > 1.3 * peaks["float32"]  # products are not all of a step
        return jnp.dtype("bfloat16" if faster else "float32"), f"matrix products here: {shown}"
    checks = {check.dtype: check for check in check_dtypes(backend)}
    correct = [check for check in checks.values() if check.correct]
    if precision != "auto":
        if not checks[precision].correct:
            other = f"precision={correct[0].dtype}" if correct else "backend.platform=cpu"
            raise ValueError(
                f"precision={precision} must be numerically correct on {backend.platform}, but is not "
                f"({checks[precision].reason}); try {other}"
            )
        return jnp.dtype(precision), "as the config says; found numerically correct here"
    if not correct:
        reasons = "; ".join(f"{check.dtype}: {check.reason}" for check in checks.values())
        raise ValueError(
            f"precision=auto finds no dtype that is numerically correct on {backend.platform} ({reasons}); "
            "try backend.platform=cpu"
        )
    best = max(correct, key=lambda check: check.tokens_per_second * (1.1 if check.dtype == "float32" else 1.0))
    rates = ", ".join(f"{check.dtype} {check.tokens_per_second:,.0f}" for check in correct)
    wrong = "".join(f"; {check.dtype} is wrong: {check.reason}" for check in checks.values() if not check.correct)
    return jnp.dtype(best.dtype), f"the fastest correct dtype, by tokens/s of a small model: {rates}{wrong}"


def check_dtypes(backend: Backend, fresh: bool = False) -> list[DtypeCheck]:
    """What is found on the platform of `backend`, for each dtype; from the cache unless `fresh`."""
    file = machine.cache_folder() / "dtypes" / f"{_fingerprint(backend)}.json"
    if file.is_file() and not fresh:
        with suppress(ValueError, TypeError, OSError):  # torn, or of another version: find out again
            return [DtypeCheck(**found) for found in json.loads(file.read_text())]
    checks = [_check_elsewhere(backend.platform, dtype) for dtype in DTYPES]
    with suppress(OSError):  # the cache is optional
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    return checks


def _fingerprint(backend: Backend) -> str:
    versions = [machine.version(name) for name in ("jax", "jaxlib", "flax", "numpy", backend.plugin or "jax")]
    facts = [backend.platform, backend.device, len(backend.devices), backend.plugin, sys.version, *versions]
    return hashlib.sha256(json.dumps([*facts, MAX_ERROR, CHECK_VERSION]).encode()).hexdigest()[:16]


def _check_elsewhere(platform: str, dtype: str) -> DtypeCheck:
    answer = run_module("tale_jax.planning.numerics", platform, dtype, timeout=TIMEOUT)
    if answer.reason:
        return DtypeCheck(dtype, False, f"the check ended with {answer.reason}")
    return DtypeCheck(**answer.json())


def check_dtype(backend: Backend, dtype: str) -> DtypeCheck:
    """Computes on the first device of `backend`, in this process, and compares with float32 on the CPU."""
    cpu = dataclasses.replace(on_platform(backend, "cpu"), devices=(jax.devices("cpu")[0],), donate=False)
    cpu = dataclasses.replace(cpu, materialize_transposes=False, cudnn_attention=False)
    backend = dataclasses.replace(backend, devices=backend.devices[:1])
    initial = jax.device_get(make_trainer(SMALL, cpu, jnp.float32, BOS_ID).init())
    reference = _numbers(cpu, "float32", initial)
    found = _numbers(backend, dtype, initial)
    errors = {name: _error(found[name], reference[name]) for name in reference}
    allowed = MAX_ERROR[dtype] * np.array([1, 3, 6, 1])
    correct = bool((np.array(list(errors.values())) <= allowed).all())  # False for NaN
    reason = "" if correct else "relative errors: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items())
    finite = {f"{name}_error": error if np.isfinite(error) else None for name, error in errors.items()}
    return DtypeCheck(dtype, correct, reason, **finite, tokens_per_second=_tokens_per_second(backend, dtype))


def _numbers(backend: Backend, dtype: str, initial: TrainState) -> dict[str, np.ndarray]:
    """Loss, gradients and updates of all weights in a training step, and logits after a decoded token."""
    trainer = make_trainer(SMALL, backend, jnp.dtype(dtype), BOS_ID)
    state = _with_scale_of(trainer, initial)
    windows = trainer.place(_random_windows(SMALL))
    state, metrics = trainer.step(jax.device_put(state, trainer.state_shardings), windows)
    for _ in range(12):  # float16 leaves out steps until its loss scale fits
        if np.isfinite(float(metrics["grad_norm"])):
            break
        state, metrics = trainer.step(state, windows)
    update = jax.tree_util.tree_map(lambda new, old: np.asarray(new) - old, state.params, initial.params)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if _is_momentum(path)]
    return {
        "loss": np.asarray(metrics["loss"], np.float32),
        "gradient": _flat(moments),
        "update": _flat(jax.tree_util.tree_leaves(update)),
        "decode": _decoded_logits(trainer, jax.device_put(initial.params, backend.devices[0])),
    }


def _with_scale_of(trainer: Trainer, initial: TrainState) -> TrainState:
    """The initial state with the loss scale that float16 asks for."""
    if trainer.abstract_state.scale is None:
        return initial.replace(scale=None)
    return initial.replace(scale=jax.device_get(trainer.init().scale))


def _is_momentum(path: tuple) -> bool:
    """First moments: after one step without clipping they are the gradients, times a constant."""
    return any(getattr(key, "name", "") in ("mu", "momentum") for key in path)


def _decoded_logits(trainer: Trainer, params: Any) -> np.ndarray:
    model = trainer.model
    tokens = _random_windows(SMALL)[:, :16]

    def decode(params: Any, tokens: Any) -> Any:
        cache = Cache.empty(SMALL.model, tokens.shape[0], model.dtype)
        read: Any = model.apply({"params": params}, tokens[:, :-1], cache=cache)
        written: Any = model.apply({"params": params}, tokens[:, -1:], cache=read[1])
        return written[0].astype(jnp.float32)

    return np.asarray(jax.jit(decode)(params, tokens))


def _flat(leaves: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])


def _error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def _random_windows(config: Config) -> np.ndarray:
    shape = (config.batch_size, config.model.seq_len + 1)
    return np.random.default_rng(0).integers(4, VOCAB_SIZE, shape, dtype=np.int32)


def _tokens_per_second(backend: Backend, dtype: str, seconds: float = 2.0) -> float:
    trainer = make_trainer(TIMED, backend, jnp.dtype(dtype), BOS_ID)
    state, windows = trainer.init(), trainer.place(_random_windows(TIMED))
    state, metrics = trainer.step(state, windows)
    float(metrics["loss"])
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start_time = time.perf_counter()
        state, metrics = trainer.step(state, windows)
        float(metrics["loss"])  # a host read: on some plugins nothing else waits
        best = min(best, time.perf_counter() - start_time)
    return TIMED.tokens_per_step / best


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(check_dtype(start_backend(sys.argv[1]), sys.argv[2]))))
