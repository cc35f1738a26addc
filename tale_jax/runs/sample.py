"""A trained model writes: once, or in a session on the terminal.

python launch/sample.py --workdir=experiments/tales --prompt=Once
python launch/sample.py --workdir=experiments/chat --chat
"""

import functools
from pathlib import Path

from tale_jax.hardware.backend import start_backend
from tale_jax.inference.chat import print_samples, prompt_loop
from tale_jax.inference.conversation import open_conversation
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.planning.numerics import choose_precision
from tale_jax.runs.experiment import open_experiment


def sample(
    workdir: Path,
    settings: SampleSettings,
    *,
    prompt: str = "",
    num_samples: int = 1,
    seed: int = 0,
    step: int = 0,
    weights: str = "auto",
    precision: str = "float32",
    interactive: bool = False,
    chat: bool = False,
    system: str = "",
    as_json: bool = False,
) -> None:
    """Prints samples, or holds a session: `interactive`, of prompts, or `chat`, a conversation.

    Args:
      workdir, step, weights: which model, as `open_experiment` has them.
      settings: how tokens are sampled, and when a sample ends.
      prompt: what a text follows; in a session that of the first turn.
      num_samples, seed: how many, and of which random numbers.
      precision: dtype to compute in.
      system: of a conversation: what the model reads before all messages.
      as_json: one object on one line for each turn.

    Raises:
      ValueError: one line, for what cannot be opened or sampled.
    """
    backend = start_backend("auto")
    dtype = choose_precision(backend, precision)[0]
    experiment = open_experiment(workdir, backend, step, dtype, weights)
    earlier = experiment.earlier_step
    parts = experiment.model, experiment.params, experiment.tokenizer
    sampler = Sampler(*parts, donate=backend.donate, earlier_step=earlier)
    facts = {"step": experiment.step, "weights": experiment.weights}
    if chat:
        talk = open_conversation(sampler, experiment.workdir, system, num_samples, **facts)
        show = functools.partial(talk.show, as_json=as_json)
        return prompt_loop(talk.stream, show, settings, seed, prompt, on_new=talk.clear)
    stream = functools.partial(sampler.stream, num_samples=num_samples)
    show = functools.partial(print_samples, as_json=as_json, **facts)
    if not interactive:
        return show(stream(prompt, settings, seed=seed))
    prompt_loop(stream, show, settings, seed, prompt)
