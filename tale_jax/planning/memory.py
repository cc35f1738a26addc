"""The memory of a training step, part by part, from the compiler's own analysis; and of its process.

On a GPU the peak is that of the step: its arguments, temporaries and results. On a CPU it is that of the process: what
it holds before the first step (Python, libraries, compiled programs) plus the step, or plus what is being written to a
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
from tale_jax.model.decoding import Cache
from tale_jax.training.checkpoint import max_concurrent_bytes
from tale_jax.training.step import Trainer

# What the compiler does not count on a CPU: fitted to the table in README.md (plan.py --table).
LATER_PROGRAMS_BYTES = 110 << 20  # programs that are compiled after the step: initial weights, scoring, decoding
UNROLLED_LAYER_BYTES = 6 << 20  # more of them for each layer that is not scanned
HEAP_GAPS = 0.25  # bytes of gaps between freed arrays, for each byte of the training state
# XLA's products in bfloat16 sum in a float32 buffer where each element sums more than so many terms.
MIN_SCRATCH_TERMS = 256
FLOAT32_SCRATCH = 0.45  # share of the results of these products, in float32, that the buffers take at the peak
CHECKPOINT_COPIES = 1.5  # bytes for each byte written at once: arrays on their way to a checkpoint are also compressed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device (on a CPU: of the process) while training, by part.

    Attributes:
      weights, optimizer, ema, batch: the arguments of a step.
      gradients, logits, activations: its temporaries; gradients as large as what is trained, logits the largest array
        along the vocabulary, activations the rest.
      results: what a step returns in new memory: as much as its arguments where they are not donated, else little.
      scratch: what the compiled program takes besides, which the compiler does not count: on a CPU gaps between freed
        arrays and float32 sums of products in bfloat16; and copies on other devices that share this memory.
      decode_cache: keys and values of the samples along training; not held during a step.
      process: on a CPU, what the process holds besides: Python, libraries, compiled programs.
      checkpoint: on a CPU, what is being written while steps wait.
      peak: the largest sum at any time.
    """

    weights: int
    optimizer: int
    ema: int
    batch: int
    gradients: int
    logits: int
    activations: int
    results: int
    scratch: int
    decode_cache: int
    process: int
    checkpoint: int
    peak: int

    @property
    def step(self) -> int:
        """Arguments, temporaries and results of a step together."""
        arguments = self.weights + self.optimizer + self.ema + self.batch
        return arguments + self.gradients + self.logits + self.activations + self.results

    @property
    def step_only(self) -> int:
        """What a step holds and the time between steps does not."""
        return self.gradients + self.logits + self.activations + self.results + self.scratch

    def parts_at_peak(self) -> dict[str, int]:
        """The parts that are held when most is: together they are `peak`."""
        held = {name: getattr(self, name) for name in ("weights", "optimizer", "ema", "batch", "process")}
        step = {name: getattr(self, name) for name in ("gradients", "logits", "activations", "results", "scratch")}
        more = step if self.step_only >= self.checkpoint else {"checkpoint": self.checkpoint}
        parts = held | more
        return parts | {"before the first step": self.peak - sum(parts.values())}


def memory_budget(config: Config, backend: Backend) -> int:
    """Bytes that a run may use: `backend.memory_gb`, or all that the backend has; 0 if unknown."""
    return int(config.backend.memory_gb * 1e9) or backend.memory


def measure_memory(config: Config, trainer: Trainer, compiled: Any, backend: Backend, process: int = 0) -> Memory:
    """The memory of a training step, from the compiler's own analysis.

    Args:
      compiled: of `trainer.compile()`.
      process: bytes that the process holds besides, on a CPU; 0: what this process holds now, and later programs.
    """
    hlo, analysis = compiled.as_text(), compiled.memory_analysis()
    machine.release_memory()
    state = trainer.abstract_state
    held = state if backend.platform == "cpu" else _of_one_device(state, trainer.state_shardings)
    trained, optimizer, ema = tree_bytes(held.params), tree_bytes(held.opt_state), tree_bytes(held.ema_params)
    weights = trained + tree_bytes(held.base)
    batch = config.batch_size * (config.model.seq_len + 1) * 4
    batch //= 1 if backend.platform == "cpu" else len(backend.devices) // config.mesh.tensor
    temporaries, arguments = analysis.temp_size_in_bytes, analysis.argument_size_in_bytes
    results = max(0, analysis.output_size_in_bytes - aliased_bytes(hlo))
    logits = min(temporaries, largest_logits_bytes(hlo, config.tokenizer.vocab_size, config.model.embed_dim))
    gradients = min(trained, temporaries - logits)
    cache = jax.eval_shape(lambda: vars(Cache.empty(config.model, config.sample.num_samples, jnp.float32)))
    checkpoint = 0
    peak = arguments + results + temporaries
    scratch = arguments - weights - optimizer - ema - batch  # a few numbers of the state
    if backend.platform == "cpu":
        peak_so_far = 0 if process else machine.peak_resident_memory()
        unrolled = 0 if config.model.scan_layers else config.model.num_layers
        process = process or machine.resident_memory() + LATER_PROGRAMS_BYTES + UNROLLED_LAYER_BYTES * unrolled
        checkpoint = int(CHECKPOINT_COPIES * max_concurrent_bytes(state.replace(base=None), backend.overlap_io))
        uncounted = HEAP_GAPS * (weights + optimizer + ema) + FLOAT32_SCRATCH * bfloat16_product_bytes(hlo)
        num_devices = sum(device.process_index == jax.process_index() for device in backend.devices)  # of this process
        step = num_devices * (results + temporaries + int(uncounted))
        scratch += (num_devices - 1) * (arguments + results + temporaries) + num_devices * int(uncounted)
        peak = max(peak_so_far, process + num_devices * arguments + max(step, checkpoint))
    return Memory(
        weights=weights,
        optimizer=optimizer,
        ema=ema,
        batch=batch,
        gradients=gradients,
        logits=logits,
        activations=temporaries - logits - gradients,
        results=results,
        scratch=max(0, scratch),
        decode_cache=tree_bytes(cache),
        process=process,
        checkpoint=checkpoint,
        peak=peak,
    )


def least_memory(config: Config, trainer: Trainer, backend: Backend) -> int:
    """Bytes that no remat and no micro-batch can save: the state, its gradients, and on a CPU the process as it is."""
    state = trainer.abstract_state
    process = machine.resident_memory() if backend.platform == "cpu" else 0
    return process + (tree_bytes(state) + tree_bytes(state.params)) // (config.mesh.fsdp * config.mesh.tensor)


def rough_activations(config: Config) -> int:
    """Bytes that a step without remat may keep for its backward pass in float32: a quick guess, and a high one."""
    model, tokens = config.model, config.micro_batch_size * config.model.seq_len
    layer = 12 * model.embed_dim + 5 * model.mlp_dim + 3 * model.num_heads * model.seq_len
    return 4 * tokens * (model.num_layers * layer + 3 * config.tokenizer.vocab_size)


def _of_one_device(tree: Any, shardings: Any) -> Any:
    """The shapes of what one device holds of a tree."""
    return jax.tree_util.tree_map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), tree, shardings)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what has their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))


def array_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array that a compiled program writes as dtype[dims]: f32[2,3], pred[]."""
    bits = re.search(r"\d+", dtype)
    return (int(bits[0]) // 8 if bits else 1) * math.prod(int(size) for size in dims.split(",") if size)


def aliased_bytes(hlo: str) -> int:
    """Bytes of the results of a compiled program that take the memory of donated arguments.

    Read from the program: the analysis of JAX 0.4 has 0 here for a program that comes from the cache of compilations.
    """
    header = hlo.partition("\n")[0]
    aliases = re.search(r"input_output_alias=\{(.*?\)) \}", header)
    if not aliases:
        return 0
    sizes = [array_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", header.partition("->")[2])]
    return sum(sizes[int(index or 0)] for index in re.findall(r"\{(\d*)\}: \(", aliases[1]))


def largest_logits_bytes(hlo: str, vocab_size: int, embed_dim: int) -> int:
    """Bytes of the largest array along the vocabulary in a compiled program, except weights [V, D]."""
    sizes = [0]
    for dtype, dims in set(re.findall(r"\b(f32|bf16|f16)\[([\d,]+)\]", hlo)):
        shape = [int(size) for size in dims.split(",")]
        if vocab_size in shape and sorted(shape)[-2:] != sorted((vocab_size, embed_dim)):
            sizes.append(array_bytes(dtype, dims))
    return max(sizes)


def bfloat16_product_bytes(hlo: str) -> int:
    """Bytes, as float32, of the results of products in bfloat16 of over MIN_SCRATCH_TERMS terms in a program."""
    shapes = {name: dims.split(",") for name, dims in re.findall(r"([\w.\-]+) = \w+\[([\d,]+)\]", hlo)}
    dot = r"= bf16\[([\d,]+)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),.*?lhs_contracting_dims=\{(\d)\}"
    return sum(
        4 * math.prod(map(int, result.split(",")))
        for result, left, axis in re.findall(dot, hlo)
        if left in shapes and int(shapes[left][int(axis)]) > MIN_SCRATCH_TERMS
    )
