"""Tasks of EleutherAI's lm-eval on our models: `evaluate.py --tasks=a,b`. Needs the extra `eval`; torch is not needed.

Gao et al., "A framework for few-shot language model evaluation", 2021. A task is a name that lm-eval knows, or a folder
of tasks in YAML. What it asks is answered by the model itself: log-likelihoods of continuations, of whole texts in
windows (as `evaluate.py` scores a document, but for EOS, which is no part of the text), and texts up to a stop string.
A text follows BOS where the model's tokenizer puts one before each text.

    run_tasks(experiment, "lambada_openai,my-tasks/", num_fewshot=0)

lm-eval takes the first of the likeliest choices. Where the right one only ties with another, that is luck, and here it
counts as wrong.
"""

import contextlib
import difflib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.model.transformer import Transformer
from tale_jax.utils.extras import missing_extra

MIN_LENGTH = 16  # of a row; lengths are powers of two up to the context, so that few programs are compiled
MAX_TEXT_TOKENS = 256  # of a text, where its task does not say

Scored = tuple[float, bool]  # nats of log-probability, and whether each token is the likeliest


class Likelihoods:
    """Log-likelihoods of continuations, in batches.

    Args:
      model: the decoder.
      params: its weights.
      batch_size: rows scored at once.
    """

    def __init__(self, model: Transformer, params: Any, batch_size: int):
        self._params, self._batch_size, self._context = params, batch_size, model.config.seq_len

        def score(params: Any, rows: Int[Array, "B T1"]) -> tuple[Array, Array]:
            targets = rows[:, 1:]
            result: Any = model.apply({"params": params}, rows[:, :-1])
            logits = result[0].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

        self._score = jax.jit(score)

    def __call__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], advance: Callable[[int], None] = lambda n: None
    ) -> list[Scored]:
        """Of each continuation after its context, both token ids; a context that is too long loses its start."""
        results: list[Scored] = [(0.0, True)] * len(pairs)
        # Rows of about one length together; the order of the results is that of the pairs.
        by_length = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for first in range(0, len(by_length), self._batch_size):
            batch = by_length[first : first + self._batch_size]
            ids = [[*pairs[i][0], *pairs[i][1]][-self._context - 1 :] for i in batch]
            length = min(self._context, max(MIN_LENGTH, 1 << (max(map(len, ids)) - 2).bit_length()))
            rows = np.zeros((self._batch_size, length + 1), np.int32)
            for row, tokens in zip(rows, ids, strict=False):
                row[: len(tokens)] = tokens
            nats, likeliest = (np.asarray(x) for x in self._score(self._params, jnp.asarray(rows)))
            for number, (i, tokens) in enumerate(zip(batch, ids, strict=True)):
                end = len(tokens) - 1
                begin = max(0, end - len(pairs[i][1]))
                total = float(nats[number, begin:end].sum(dtype=np.float64))
                results[i] = total, bool(likeliest[number, begin:end].all())
            advance(len(batch))
        return results

    def of_text(self, ids: Sequence[int], prefix: int) -> float:
        """Nats of a whole text after the token `prefix`, every token once: in windows of the context that touch."""
        tokens = [prefix, *ids]
        starts = range(0, max(1, len(tokens) - 1), self._context)
        pairs = [(tokens[i : i + 1], tokens[i + 1 : i + 1 + self._context]) for i in starts]
        return sum(nats for nats, _ in self(pairs))


def make_lm(sampler: Sampler, likelihoods: Likelihoods) -> Any:
    """The model as lm-eval asks it. Raises ImportError without the library."""
    from lm_eval.api.model import TemplateLM

    tokenizer = sampler.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.puts_bos else []

    class TaleLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False else [*bos, *ids]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Scored]:
            return super().loglikelihood(requests, disable_tqdm=True)  # a bar of its own

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[Scored]:
            return likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = (tokenizer.encode(request.args[0]).tolist() for request in requests)
            return [likelihoods.of_text(ids, self.prefix_token_id) for ids in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._generated(*request.args) for request in requests]

        def _generated(self, context: str, options: Mapping[str, Any]) -> str:
            stop = options.get("until") or []
            settings = SampleSettings(
                max_tokens=int(options.get("max_gen_toks", MAX_TEXT_TOKENS)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
                long_prompt="window",
            )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            return next(d.sample.text for d in sampler.stream("", settings, ids=ids) if d.sample)

    return TaleLM()


def run_tasks(
    sampler: Sampler, likelihoods: Likelihoods, tasks: str, num_fewshot: int | None = None, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """The measures of each task, by its name, as lm-eval names them: `acc`, `word_perplexity`, …

    Args:
      sampler, likelihoods: of the model.
      tasks: names, or folders of YAML files, with commas between.
      num_fewshot: examples before each question; None: as the task says.
      limit: documents of each task; 0: all.

    Raises:
      ValueError: one line, for a task that is not known or whose data cannot be had, and without the library.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each task, beside our own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library: Any = importlib.import_module("lm_eval")
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(missing_extra("--tasks", f"lm-eval ({error.name})", "eval")) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    folders = [Path(name).expanduser() for name in asked if "/" in name or Path(name).expanduser().is_dir()]
    for folder in folders:
        if not list(folder.glob("*.yaml")):
            raise ValueError(f"--tasks={folder} must be a folder that holds tasks as .yaml files; give another")
    names = [name for name in asked if Path(name).expanduser() not in folders]
    manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
    for folder in folders:
        names += [_task_name(file) for file in sorted(folder.glob("*.yaml")) if not file.stem.startswith("_")]
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "see https://github.com/EleutherAI/lm-evaluation-harness"
            raise ValueError(f"--tasks={name} must be a task of lm-eval or a folder of tasks; {hint}")
    if not names:
        raise ValueError("--tasks= must name tasks; try --tasks=lambada_openai, or a folder of tasks in YAML")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = library.simple_evaluate(
                model=make_lm(sampler, likelihoods),
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit or None,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=100,
            )
    except Exception as error:  # of the task's own code, of its data, and of the network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--tasks={','.join(names)} cannot be run ({type(error).__name__}: {reason}); check the task's data "
            "and the network"
        ) from None
    return _measures(found or {"results": {}})


def _task_name(file: Path) -> str:
    """The name in a task's file: its line `task: NAME`."""
    lines = (line.split("#")[0].partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return next((value.strip().strip("'\"") for key, _, value in lines if key == "task"), file.stem)


def _measures(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of each task, without the names of filters; ties of the right choice are wrong."""
    measures: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        numbers = {
            name.removesuffix(",none").replace("_stderr,none", "_stderr"): value
            for name, value in values.items()
            if name != "sample_len" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        samples = found.get("samples", {}).get(task, [])
        if ties := sum(map(_is_tie, samples)):
            numbers["acc"] -= ties / len(samples)
            numbers["ties"] = ties
        measures[task] = {"samples": len(samples)} | numbers
    return measures


def _is_tie(sample: Mapping[str, Any]) -> bool:
    """Whether the right choice counts as right, and another is as likely."""
    scores, target = [each[0] if isinstance(each, (list, tuple)) else each for each in sample["filtered_resps"]], None
    with contextlib.suppress(TypeError, ValueError):
        target = int(sample["target"])
    if target is None or "acc" not in sample or not sample["acc"] or not 0 <= target < len(scores):
        return False
    return [float(score) for score in scores].count(float(scores[target])) > 1
