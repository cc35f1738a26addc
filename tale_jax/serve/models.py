"""A model that is served: a workdir opened once, its engine, and the weights of its checkpoints and ablations.

An ablated head is one whose output is zeroed: the rows of the output projection that read it are zero. An ablated layer
adds nothing to the residual stream: both of its output projections are zero. So an ablated model is the same program
with other weights, for generation, scoring and inspection alike.

    model = open_model(Path("experiments/tales"), "tales", backend)
    model.engine.start()
    params = model.params(Variant(step=500, heads=((0, 1),)))
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tale_jax.data.chat_template import read_template
from tale_jax.hardware.backend import Backend
from tale_jax.inference.sampler import Sampler
from tale_jax.model.transformer import count_parameters
from tale_jax.runs.experiment import Experiment, open_experiment
from tale_jax.serve.engine import Engine
from tale_jax.training.checkpoint import SavedParams

MAX_VARIANTS = 8  # weights in memory at a time


@dataclasses.dataclass(frozen=True)
class Variant:
    """Weights of a model: those of a step, with heads (layer, head) and whole layers ablated."""

    step: int
    heads: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()


class Model:
    """See `open_model`.

    Attributes:
      name: as requests call it.
      default: the weights that a request gets which asks for none.
      template: source of the chat template, "" where there is none.
    """

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        engine_of: Callable[[Sampler, Callable[[Any], Any]], Engine],
        reopen: Callable[[int], Experiment],
        donate: bool = False,
    ):
        self.name, self.workdir, self.config = name, experiment.workdir, experiment.config
        self.tokenizer, self.model, self.weights_kind = experiment.tokenizer, experiment.model, experiment.weights
        self.context, self.num_params = experiment.config.model.seq_len, count_parameters(experiment.params)
        self.default, self._reopen = Variant(experiment.step), reopen
        self._cache: collections.OrderedDict[Variant, tuple[Any, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.sampler = Sampler(experiment.model, None, experiment.tokenizer, donate=donate)
        self._own = experiment.params, self.sampler.load(experiment.params)  # always kept
        self.engine = engine_of(self.sampler, lambda variant: self._both(variant or self.default)[1])
        self.max_token_bytes = max(len(text) for text in self.tokenizer.token_bytes)
        self.template = read_template(self.workdir, self.tokenizer)

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that the workdir holds now."""
        return SavedParams(self.workdir).steps

    @property
    def tells_tales(self) -> bool:
        """Whether the grammar of the embedded tales can judge its texts."""
        return self.config.corpus.name == "tales"

    def params(self, variant: Variant) -> Any:
        """Raises ValueError, without a path in it, when a checkpoint is not there or cannot be read."""
        return self._both(variant)[0]

    def _both(self, variant: Variant) -> tuple[Any, Any]:
        """The weights as the model has them, and as decoding needs them."""
        if variant == self.default:
            return self._own
        with self._lock:
            if variant in self._cache:
                self._cache.move_to_end(variant)
                return self._cache[variant]
            plain = Variant(variant.step)
            if plain == self.default:
                params = self._own[0]
            elif plain in self._cache:
                params = self._cache[plain][0]
            else:
                params = self._restore(variant.step)
            if variant != plain:
                params = ablate(params, variant.heads, variant.layers, self.config.model.head_dim)
            self._cache[variant] = params, self.sampler.load(params)
            while len(self._cache) > MAX_VARIANTS:
                self._cache.popitem(last=False)
            return self._cache[variant]

    def _restore(self, step: int) -> Any:
        try:
            return self._reopen(step).params
        except ValueError:  # its line has the folder in it
            raise ValueError(f"step={step} is not a checkpoint that can be read; ask /inspect/checkpoints") from None


def open_model(
    workdir: Path,
    name: str,
    backend: Backend,
    *,
    dtype: Any = jnp.float32,
    weights: str = "auto",
    rows: int = 32,
    block_rows: int = 0,
    max_queue: int = 256,
) -> Model:
    """Restores the best checkpoint of a workdir and compiles what requests need; its engine is not started yet.

    Args:
      workdir: of the experiment.
      name: as requests call it.
      backend: from `start_backend`.
      dtype: what the model computes in.
      weights: last, ema, auto or mean:K, as `open_experiment` has them.
      rows, block_rows, max_queue: of the engine; 0 rows of a block: what suits the backend.

    Raises:
      ValueError: in one line, for a workdir that holds no trained model.
    """

    def reopen(step: int) -> Experiment:
        return open_experiment(workdir, backend, step, dtype, weights)

    def engine_of(sampler: Sampler, weights_of: Callable[[Any], Any]) -> Engine:
        size = block_rows or (2 if backend.platform == "cpu" else rows)
        size = min(rows, max(size, sampler.min_rows))
        return Engine(sampler, weights_of, rows=rows, block_rows=size, max_queue=max_queue)

    experiment = open_experiment(workdir, backend, 0, dtype, weights)
    model = Model(name, experiment, engine_of, reopen, backend.donate)
    model.engine.warm_up(model.engine.weights_of(None))
    return model


def ablate(params: Any, heads: Sequence[tuple[int, int]], layers: Sequence[int], head_dim: int) -> Any:
    """The weights of the same model with heads (layer, head) and whole layers ablated."""
    blocks = params["blocks"]
    output, down = blocks["attention"]["output"]["kernel"], blocks["mlp"]["down"]["kernel"]
    for layer, head in heads:
        output = output.at[layer, head * head_dim : (head + 1) * head_dim].set(0)
    for layer in layers:
        output, down = output.at[layer].set(0), down.at[layer].set(0)
    blocks = {
        **blocks,
        "attention": {**blocks["attention"], "output": {"kernel": output}},
        "mlp": {**blocks["mlp"], "down": {"kernel": down}},
    }
    return {**params, "blocks": blocks}


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """The folders' names; one that occurs again gets a suffix: tales, tales-2."""
    names: list[str] = []
    for workdir in workdirs:
        base = workdir.resolve().name or "model"
        number = 1
        while (name := base if number == 1 else f"{base}-{number}") in names:
            number += 1
        names.append(name)
    return names
