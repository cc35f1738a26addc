"""Every program that a run compiles, by name: to be planned, timed, or compared with what a Metal plugin supports.

for program in audit(config, backend, "mps", jnp.bfloat16):
    assert not program.faults, "\\n".join(program.faults)
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tale_jax.config import Config
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.scoring import Scorer
from tale_jax.hardware.backend import Backend, for_platform, tracing_for_metal
from tale_jax.hardware.stablehlo import Program, check_program
from tale_jax.inference.sampler import Sampler
from tale_jax.inference.sampling import SamplingParams
from tale_jax.training.step import Trainer, make_trainer


class UntrainedTokenizer(Tokenizer):
    """Size and special tokens of a tokenizer that is not trained yet: programs need nothing else of it."""

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 3

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


class CompiledCall(NamedTuple):
    """A jitted function, and the shapes of the arguments that a run calls it with."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


def programs(config: Config, trainer: Trainer) -> dict[str, CompiledCall]:
    """Every function that a run compiles, by name."""
    tokenizer = UntrainedTokenizer(config.tokenizer.vocab_size)
    params, int32 = trainer.abstract_state.eval_params, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    length, num_samples = config.model.seq_len, config.sample.num_samples
    scorer = Scorer(trainer.model, tokenizer, config.evaluate.batch_size)
    sampler = Sampler(trainer.model, None, tokenizer)
    scored = (config.evaluate.batch_size, length)
    weights = jax.eval_shape(sampler.load, params)
    seen = jax.ShapeDtypeStruct((config.tokenizer.vocab_size,), jnp.bool_)
    prefill = (weights, int32((1, length)), int32(()), seen)
    state = jax.eval_shape(functools.partial(sampler.prefill, rows=num_samples), *prefill)
    key, scalar = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)
    sampling: Any = (scalar, int32(()), scalar, scalar, scalar)
    decode = (weights, state, key, int32((num_samples,)), SamplingParams(*sampling))
    score = (params, int32((scored[0], length + 1)), jax.ShapeDtypeStruct(scored, jnp.float32))
    return {
        "init": CompiledCall(trainer.init, ()),
        "train": CompiledCall(trainer.jitted_step, (trainer.abstract_state, int32((config.batch_size, length + 1)))),
        "score": CompiledCall(scorer.score, score),
        "load": CompiledCall(sampler.load, (params,)),
        "prefill": CompiledCall(sampler.prefill, prefill, {"rows": num_samples}),
        "decode": CompiledCall(sampler.decode, decode),
    }


def audit(config: Config, backend: Backend, platform: str, dtype: Any) -> Iterator[Program]:
    """Lowers every program of a planned config as `platform` (METAL: jax-metal, mps: jax-mps) would get it."""
    with tracing_for_metal():
        trainer = make_trainer(config, for_platform(backend, "metal"), dtype, UntrainedTokenizer.bos_id)
        for name, call in programs(config, trainer).items():
            lowered = call.function.trace(*call.args, **call.kwargs).lower(lowering_platforms=(platform,))
            yield check_program(name, lowered.compiler_ir("stablehlo"), platform)
