"""Every program that a run compiles, by name: to be planned, timed, or held against what a Metal plugin can do.

for program in audit(config, backend, "mps", jnp.bfloat16):
    assert not program.faults, "\\n".join(program.faults)
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tale_jax.config import Config
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.scoring import Scorer
from tale_jax.hardware.backend import Backend, on_platform, tracing_for_metal
from tale_jax.hardware.stablehlo import Program, inspect
from tale_jax.inference.sampler import Sampler
from tale_jax.inference.sampling import SamplingParams
from tale_jax.training.step import Trainer, make_trainer


class Untrained(Tokenizer):
    """The ids of a tokenizer that does not exist yet: programs see nothing else of it. Its special tokens are where
    ours are."""

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 3

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def programs(config: Config, trainer: Trainer) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every function that a run compiles, with the shapes of its arguments: name → (jitted function, args, kwargs)."""
    tokenizer = Untrained(config.tokenizer.vocab_size)
    params, int32 = trainer.abstract_state.params, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    length, rows = config.model.seq_len, config.sample.num_samples
    scorer = Scorer(trainer.model, tokenizer, config.evaluate.batch_size)
    sampler = Sampler(trainer.model, None, tokenizer)
    scored = (config.evaluate.batch_size, length)
    weights = jax.eval_shape(sampler.load, params)
    seen = jax.ShapeDtypeStruct((config.tokenizer.vocab_size,), jnp.bool_)
    prefill = (weights, int32((1, length)), int32(()), seen)
    state = jax.eval_shape(functools.partial(sampler.prefill, rows=rows), *prefill)
    key, scalar = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)
    sampling: Any = (scalar, int32(()), scalar, scalar, scalar)
    return {
        "init": (trainer.init, (), {}),
        "train": (trainer.jitted_step, (trainer.abstract_state, int32((config.batch_size, length + 1))), {}),
        "score": (scorer.score, (params, int32((scored[0], length + 1)), jax.ShapeDtypeStruct(scored, "float32")), {}),
        "load": (sampler.load, (params,), {}),
        "prefill": (sampler.prefill, prefill, {"rows": rows}),
        "decode": (sampler.decode, (weights, state, key, int32((rows,)), SamplingParams(*sampling)), {}),
    }


def audit(config: Config, backend: Backend, platform: str, dtype: Any) -> Iterator[Program]:
    """Lowers every program of a planned config as `platform` (METAL: jax-metal, mps: jax-mps) would get it."""
    with tracing_for_metal():
        trainer = make_trainer(config, on_platform(backend, "metal"), dtype, Untrained.bos_id)
        for name, (function, args, kwargs) in programs(config, trainer).items():
            lowered = function.trace(*args, **kwargs).lower(lowering_platforms=(platform,))
            yield inspect(name, lowered.compiler_ir("stablehlo"), platform)
