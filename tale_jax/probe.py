"""Does this machine compute right numbers, and how fast? Found out in another process, since old plugins abort.

For each dtype a tiny model takes one training step and decodes one token, and loss, gradients and logits are compared
with float32 on the CPU; then training steps are timed, each ended by a host read (on some plugins nothing else waits).
What was found is kept in the user's cache folder for this machine and these versions.

    python -m tale_jax.probe cpu bfloat16        # what the process prints: one JSON object as its last line
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax import backend, machine
from tale_jax.config import ModelConfig
from tale_jax.model.transformer import Cache, Transformer
from tale_jax.training.step import token_losses

DTYPES = ("float32", "bfloat16", "float16")
# Of the relative error of loss and logits; of gradients three times that.
LIMITS = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}
TIMEOUT = 300  # seconds
SMALL = ModelConfig(
    num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=192, seq_len=64, rope_base=1e4, norm_eps=1e-5,
    qk_norm=True, tie_embeddings=True, scale_embeddings=True, zero_init_outputs=False, induction_init=False,
    induction_match=False,
    dropout=0.0, word_dropout=0.0, logit_softcap=0.0, mask_documents=False, scan_layers=False,
)  # fmt: skip
TIMED = dataclasses.replace(SMALL, embed_dim=384, num_heads=6, num_kv_heads=6, mlp_dim=1024, seq_len=256)
VOCAB, BOS = 512, 1
SCALE = 1024.0  # of the loss, so that gradients are not below what float16 can tell


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a probe found about one dtype.

    Attributes:
      dtype: float32, bfloat16 or float16.
      correct: it ran, and everything came within LIMITS of the CPU.
      reason: what went wrong, "" if nothing did.
      loss_error, gradient_error, decode_error: relative to float32 on the CPU.
      tokens_per_second: of training steps of a small model.
    """

    dtype: str
    correct: bool
    reason: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    decode_error: float | None = None
    tokens_per_second: float = 0.0


def choose_precision(here: backend.Backend, precision: str) -> tuple[Any, str]:
    """The dtype to compute in, and why. `precision` is auto or a dtype; auto takes the fastest correct one.

    float32 wins when it is nearly as fast. A CPU is what others are compared with, so there large products are timed,
    in less than a second, and nothing is probed. Raises ValueError for a dtype that is not computed rightly here.
    """
    if here.platform == "cpu":
        if precision != "auto":
            return jnp.dtype(precision), "as the config says"
        # No CPU that we know of is faster in float16 than in bfloat16.
        peaks = {name: backend.matmul_peak(name) for name in ("float32", "bfloat16")}
        shown = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
        faster = peaks["bfloat16"] > 1.3 * peaks["float32"]  # products are not all of a step
        return jnp.dtype("bfloat16" if faster else "float32"), f"matrix products here: {shown}"
    findings = {finding.dtype: finding for finding in probe(here)}
    good = [finding for finding in findings.values() if finding.correct]
    if precision != "auto":
        if not findings[precision].correct:
            other = f"precision={good[0].dtype}" if good else "backend.platform=cpu"
            raise ValueError(
                f"precision={precision} is not computed rightly on {here.platform} ({findings[precision].reason}); "
                f"try {other}"
            )
        return jnp.dtype(precision), "as the config says; the probe found it right here"
    if not good:
        raise ValueError(
            f"precision=auto finds no dtype that {here.platform} computes rightly "
            f"({'; '.join(f'{f.dtype}: {f.reason}' for f in findings.values())}); try backend.platform=cpu"
        )
    best = max(good, key=lambda finding: finding.tokens_per_second * (1.1 if finding.dtype == "float32" else 1.0))
    rates = ", ".join(f"{finding.dtype} {finding.tokens_per_second:,.0f}" for finding in good)
    wrong = "".join(f"; {f.dtype} is wrong: {f.reason}" for f in findings.values() if not f.correct)
    return jnp.dtype(best.dtype), f"the fastest correct dtype, by tokens/s of a small model: {rates}{wrong}"


def probe(here: backend.Backend, fresh: bool = False) -> list[Finding]:
    """What is found on the platform of `here`, for each dtype; from the cache unless `fresh`."""
    file = machine.cache_folder() / "probes" / f"{_fingerprint(here)}.json"
    if file.is_file() and not fresh:
        try:
            return [Finding(**found) for found in json.loads(file.read_text())]
        except (ValueError, TypeError):
            pass  # torn, or of another version: find out again
    findings = [_run(here.platform, dtype) for dtype in DTYPES]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    partial.replace(file)
    return findings


def _fingerprint(here: backend.Backend) -> str:
    versions = [machine.version(name) for name in ("jax", "jaxlib", "flax", "numpy", here.plugin or "jax")]
    facts = [here.platform, here.device, len(here.devices), here.plugin, sys.version, *versions, LIMITS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _run(platform: str, dtype: str) -> Finding:
    command = [sys.executable, "-m", "tale_jax.probe", platform, dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Finding(dtype, False, f"no answer within {TIMEOUT} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = " ".join((done.stderr.strip().splitlines() or ["nothing"])[-1].split())[:200]
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return Finding(dtype, False, f"the probe ended with {how}: {said}")
    return Finding(**json.loads(lines[-1]))


def examine(here: backend.Backend, dtype: str) -> Finding:
    """Computes on the first device of `here`, in this process, and compares with float32 on the CPU."""
    reference = _numbers(jax.devices("cpu")[0], "float32", False)
    found = _numbers(here.devices[0], dtype, here.natural, here.fused)
    loss, gradient, decoded = (_error(found[name], reference[name]) for name in ("loss", "gradient", "decode"))
    limit = LIMITS[dtype]
    finite = all(np.isfinite(value) for value in (loss, gradient, decoded))
    right = finite and loss <= limit and gradient <= 3 * limit and decoded <= limit
    reason = "" if right else f"relative errors of loss {loss:.1e}, gradients {gradient:.1e}, decoding {decoded:.1e}"
    errors = [value if np.isfinite(value) else None for value in (loss, gradient, decoded)]
    return Finding(dtype, right, reason, *errors, tokens_per_second=_tokens_per_second(here, dtype))


def _numbers(device: Any, dtype: str, natural: bool, fused: bool = False) -> dict[str, np.ndarray]:
    """Loss, all gradients, and logits after a decoded token, on `device`."""
    cpu = jax.devices("cpu")[0]
    model = Transformer(SMALL, VOCAB, jnp.dtype(dtype), natural, fused=fused)
    windows = np.random.default_rng(0).integers(4, VOCAB, (4, SMALL.seq_len + 1), dtype=np.int32)
    with jax.default_device(cpu):
        params = model.init(jax.random.PRNGKey(0), jnp.asarray(windows[:, :8]))["params"]
    with jax.default_device(device):
        params = jax.device_put(params, device)
        step = jax.jit(jax.value_and_grad(lambda p, w: SCALE * jnp.mean(token_losses(model, p, w, BOS))))
        loss, gradients = jax.tree_util.tree_map(lambda x: x / SCALE, step(params, windows))

        def decode(params: Any, tokens: Any) -> Any:
            cache = Cache.empty(SMALL, tokens.shape[0], model.dtype)
            read: Any = model.apply({"params": params}, tokens[:, :-1], cache=cache)
            written: Any = model.apply({"params": params}, tokens[:, -1:], cache=read[1])
            return written[0].astype(jnp.float32)

        logits = jax.jit(decode)(params, windows[:, :16])
    flat = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree_util.tree_leaves(gradients)]
    return {"loss": np.asarray(loss, np.float32), "gradient": np.concatenate(flat), "decode": np.asarray(logits)}


def _error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def _tokens_per_second(here: backend.Backend, dtype: str, seconds: float = 2.0) -> float:
    model = Transformer(TIMED, VOCAB, jnp.dtype(dtype), here.natural, fused=here.fused)
    windows = np.random.default_rng(0).integers(4, VOCAB, (4, TIMED.seq_len + 1), dtype=np.int32)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), windows[:, :8])["params"]
    step = jax.jit(jax.value_and_grad(lambda p, w: jnp.mean(token_losses(model, p, w, BOS))))
    float(step(params, windows)[0])
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        loss, gradients = step(params, windows)
        _ = float(loss), float(jax.tree_util.tree_leaves(gradients)[0].ravel()[0])
        best = min(best, time.perf_counter() - begin)
    return windows[:, 1:].size / best


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(examine(backend.start(sys.argv[1]), sys.argv[2]))))
