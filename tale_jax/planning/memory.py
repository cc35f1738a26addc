"""What a training step holds, part by part, by its compiler's own analysis; and what its process holds besides.

On a GPU the peak is that of the step: its arguments and everything in temporaries. On a CPU it is that of the process:
what it holds by now (Python, the libraries, compiled programs), plus the program, or what is on its way into a
checkpoint while steps wait.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from tale_jax.config import Config
from tale_jax.hardware import machine
from tale_jax.hardware.backend import Backend
from tale_jax.model.transformer import Cache
from tale_jax.training.checkpoint import max_concurrent_bytes
from tale_jax.training.step import Trainer

# On a CPU, measured (plan.py --table). Programs that come later stay in memory: for initial weights, scoring and
# decoding, and layers that were unrolled; freed arrays leave gaps. XLA's bfloat16 kernels keep float32 buffers that the
# compiler does not count, where they sum more than 256 terms. Arrays on their way to a checkpoint are also compressed.
PROGRAMS = 110 << 20  # bytes
UNROLLED = 6 << 20  # bytes a layer
GAPS = 0.25  # of the state
KERNELS, TERMS = 0.45, 256  # of the results of such products, in float32
CHECKPOINT = 1.5  # of the bytes written at once


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device (on a CPU: of the process) while training, by part.

    Attributes:
      weights, optimizer, ema, batch: the arguments of a step, as the compiler has them.
      gradients, logits, activations: of what it holds in temporaries; gradients are as large as the weights, logits the
        largest array along the vocabulary, activations the rest.
      results: what a step returns besides its arguments' memory: as much as they, where nothing is donated.
      decode_cache: keys and values of the samples along training; not held during a step.
      process: Python, libraries, compiled programs; checkpoint: what is on its way to the disk while steps wait. Both
        0 on a GPU.
      peak: the most at any time.
    """

    weights: int
    optimizer: int
    ema: int
    batch: int
    gradients: int
    logits: int
    activations: int
    results: int
    decode_cache: int
    process: int
    checkpoint: int
    peak: int


def memory_budget(config: Config, backend: Backend) -> int:
    """Bytes that a run may use: as the config says, or what there is; 0 if unknown."""
    return int(config.backend.memory_gb * 1e9) or backend.memory


def measure_memory(config: Config, trainer: Trainer, compiled: Any, backend: Backend, process: int = 0) -> Memory:
    """What a training step holds, by its compiler's own analysis.

    `compiled`: of `trainer.compile()`. `process`: bytes that the process holds besides, on a CPU; 0: what this one
    holds now.
    """
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    machine.release_memory()
    state = trainer.abstract_state
    weights, optimizer, ema = tree_bytes(state.params), tree_bytes(state.opt_state), tree_bytes(state.ema_params)
    batch = config.batch_size * (config.model.seq_len + 1) * 4
    temporaries, arguments = analysis.temp_size_in_bytes, analysis.argument_size_in_bytes
    results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    logits = min(temporaries, _largest_along(text, config.tokenizer.vocab_size, config.model.embed_dim))
    gradients = min(weights, temporaries - logits)
    cache = jax.eval_shape(lambda: vars(Cache.empty(config.model, config.sample.num_samples, jnp.float32)))
    checkpoint, floor = 0, 0
    peak = arguments + results + temporaries
    if backend.platform == "cpu":
        floor = 0 if process else machine.peak_resident_memory()
        layers = 0 if config.model.scan_layers else config.model.num_layers
        process = process or machine.resident_memory() + PROGRAMS + UNROLLED * layers
        checkpoint = int(CHECKPOINT * max_concurrent_bytes(state, backend.overlap_io))
        program = results + temporaries + int(GAPS * (weights + optimizer + ema) + KERNELS * _bfloat16_products(text))
        peak = max(floor, process + len(backend.devices) * arguments + max(len(backend.devices) * program, checkpoint))
    return Memory(
        weights=weights,
        optimizer=optimizer,
        ema=ema,
        batch=batch,
        gradients=gradients,
        logits=logits,
        activations=temporaries - logits - gradients,
        results=results,
        decode_cache=tree_bytes(cache),
        process=process,
        checkpoint=checkpoint,
        peak=peak,
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what has their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))


def _largest_along(text: str, vocab_size: int, embed_dim: int) -> int:
    """Bytes of the largest array of a compiled program that has an axis of the vocabulary, weights left out."""
    sizes, width = [0], {"f32": 4, "bf16": 2, "f16": 2}
    for kind, dims in set(re.findall(r"\b(f32|bf16|f16)\[([\d,]+)\]", text)):
        shape = [int(size) for size in dims.split(",")]
        if vocab_size in shape and sorted(shape)[-2:] != sorted((vocab_size, embed_dim)):
            sizes.append(math.prod(shape) * width[kind])
    return max(sizes)


def _bfloat16_products(text: str) -> int:
    """Bytes, in float32, of the results of bfloat16 products of more than TERMS terms in a compiled program."""
    shapes = {name: dims.split(",") for name, dims in re.findall(r"([\w.\-]+) = \w+\[([\d,]+)\]", text)}
    dot = r"= bf16\[([\d,]+)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),.*?lhs_contracting_dims=\{(\d)\}"
    return sum(
        4 * math.prod(map(int, result.split(",")))
        for result, left, axis in re.findall(dot, text)
        if left in shapes and int(shapes[left][int(axis)]) > TERMS
    )
