"""How good the model of a workdir is: a whole split scored, tales judged, samples measured beside held-out text.

python launch/evaluate.py --workdir=experiments/tales --split=test --json
python launch/evaluate.py --workdir=experiments/wikitext2 --quality
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tale_jax.data.chat_template import ChatTemplate, read_template
from tale_jax.data.corpus import open_corpus
from tale_jax.data.marks import bos_or_marked, token_ids
from tale_jax.data.token_files import load_tokens
from tale_jax.evaluation.lm_eval import Likelihoods, run_tasks
from tale_jax.evaluation.quality_samples import BATCH_SIZE, measure_quality, texts_to_compare, write_samples
from tale_jax.evaluation.scoring import Evaluation, Scorer
from tale_jax.evaluation.tales import judge_answers, judge_samples
from tale_jax.evaluation.text_quality import NOT_TESTED, quality_rows
from tale_jax.hardware.backend import Backend
from tale_jax.inference.sampler import Sampler, check_seed
from tale_jax.model.transformer import count_parameters
from tale_jax.runs.experiment import Experiment, open_experiment
from tale_jax.utils.files import JsonLines, to_json, write_atomically
from tale_jax.utils.paths import quoted
from tale_jax.utils.progress import Progress, stdout_width
from tale_jax.utils.streams import notice

STANDARD_ERROR = "_stderr"  # at the end of the name of a measure's standard error
NAME_WIDTH = 29
LONG_WORD, FEW_WORDS = 15, 1000  # bytes a word, words of a split
LARGE, HARDLY_LEARNED = 1000, 10_000  # word perplexities: of few words, and of any text
FEW_TEXTS = 5  # too few to tell about other ones


def evaluate(
    experiment: Experiment,
    split: str = "valid",
    stride: int = 0,
    num_samples: int = 200,
    sample_temperature: float = 0.7,
    seed: int = 0,
    with_quality: bool = False,
) -> dict[str, Any]:
    """All measures of a split, as `evaluate.py --json` prints them.

    Losses are in nats per token, where EOS counts and BOS does not; `bits_per_byte` is per byte of UTF-8. `params` is
    the number of weights.

    Args:
      experiment: the model and its workdir.
      split: train, valid or test.
      stride: tokens between windows; 0: the context length.
      num_samples: tales to sample and judge, where the text is tales; of questions about tales so many are answered;
        0: none.
      sample_temperature: of these tales.
      seed: of all samples.
      with_quality: adds `quality`, one result for each temperature (see `measure_quality`), and writes
        `quality.jsonl`.

    Raises:
      ValueError: one line, for a split that is not prepared or too short to measure samples beside it, or a stride
        longer than the context.
    """
    config, tokenizer, log = experiment.config, experiment.tokenizer, experiment.workdir / "log.txt"
    tokens, manifest = load_tokens(experiment.workdir, split)
    bos_id = bos_or_marked(tokens, tokenizer.bos_id)
    scorer = Scorer(experiment.model, tokenizer, config.evaluate.batch_size, bos_id=bos_id)
    # What can be refused is refused before the split is scored.
    check_seed(seed)
    if not 0 <= sample_temperature < math.inf:
        rule = "be finite and at least 0"
        raise ValueError(f"sample_temperature={sample_temperature} must {rule}; try --sample_temperature=0.7")
    if with_quality and manifest.chat:
        raise ValueError(
            f"--quality must measure text, and {experiment.workdir} holds conversations; leave --quality out"
        )
    with Progress(f"read {split}", total=manifest.documents, unit="tales") as progress:
        evaluation = Evaluation(
            experiment.workdir, split, scorer, tokenizer, config.windows, stride, advance=progress.advance
        )
    experiment.check_windows(evaluation.manifest)
    if with_quality:
        texts_to_compare(token_ids(tokens, bos_id), tokenizer, config.model.seq_len)
    with Progress(f"evaluate {split}", total=len(evaluation.spans), unit="windows", log=log) as progress:
        result = evaluation(experiment.params, progress.advance)
    result.pop("split_windows", None)  # all of them
    result |= {"step": experiment.step, "weights": experiment.weights, "params": count_parameters(experiment.params)}
    if evaluation.manifest.corpus["name"] == "tales" and num_samples:
        with Progress("judge samples", total=num_samples, unit="tales", log=log) as progress:
            sampler = Sampler(experiment.model, experiment.params, tokenizer, earlier_step=experiment.earlier_step)
            result |= judge_samples(
                sampler, experiment.workdir, num_samples, sample_temperature, seed, progress.advance
            )
    if manifest.corpus["name"] == "tales_chat" and num_samples:
        with Progress("judge answers", total=num_samples, unit="questions", log=log) as progress:
            sampler = Sampler(experiment.model, experiment.params, tokenizer, earlier_step=experiment.earlier_step)
            template = ChatTemplate(tokenizer, read_template(experiment.workdir, tokenizer))
            documents = open_corpus(config.corpus, config.seed).documents(split)
            result |= judge_answers(sampler, template, documents, num_samples, progress.advance)
    if with_quality:
        result["quality"] = _sample_quality(experiment, split, seed)
    return result


def score_valid(workdir: Path, backend: Backend, step: int, out: Path | None) -> None:
    """Scores all of the valid split by the checkpoint of a step; the result goes into `out`, and is kept in the
    workdir. None: nothing is to be scored.

    Raises ValueError, in one line, where several processes have trained: an evaluation is one process.
    """
    if out is None:
        return
    if jax.process_count() > 1:
        remedy = f"leave it out, and run launch/evaluate.py --workdir={quoted(workdir)} afterwards"
        raise ValueError(f"--score must be left to one process, and {jax.process_count()} have trained; {remedy}")
    result = evaluate(open_experiment(workdir, backend, step), num_samples=0)
    keep(workdir, result)
    write_atomically(out, json.dumps(to_json(result), indent=2) + "\n")


def evaluate_tasks(
    experiment: Experiment, tasks: str, num_fewshot: int | None = None, limit: int = 0
) -> dict[str, Any]:
    """The measures of lm-eval's tasks, see `lm_eval.py`.

    Raises:
      ValueError: one line, for a task that cannot be run.
    """
    sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer)
    likelihoods = Likelihoods(experiment.model, experiment.params, experiment.config.evaluate.batch_size)
    with Progress("run tasks", log=experiment.workdir / "log.txt"):
        measures = run_tasks(sampler, likelihoods, tasks, num_fewshot, limit)
    result = {"tasks": measures, "num_fewshot": num_fewshot, "limit": limit}
    result |= {"step": experiment.step, "weights": experiment.weights}
    return result


def keep(workdir: Path, result: Mapping[str, Any]) -> bool:
    """Appends a result to `evaluations.jsonl`; False, with a note, where the disk does not let it."""
    path = workdir / "evaluations.jsonl"
    return _is_written(path, lambda: JsonLines(path).append(dict(result) | {"time": time.time()}))


def _is_written(path: Path, write: Callable[[], None]) -> bool:
    """Calls `write`; a full or read-only disk is told, and takes no result from who waited for it."""
    try:
        write()
    except OSError as error:
        notice(f"{path} does not keep the result: {error.strerror or error}")
        return False
    return True


def describe_tasks(result: Mapping[str, Any]) -> str:
    """The result of `evaluate_tasks`, human-readable, in lines."""
    lines = []
    for task, measures in result["tasks"].items():
        lines.append(f"{task} ({measures['samples']:,} documents)")
        for name, value in measures.items():
            if name != "samples" and not name.endswith(STANDARD_ERROR):
                lines.append(f"{name:>{NAME_WIDTH}}  {_with_interval(name, value, measures)}")
    return "\n".join(lines)


def _sample_quality(experiment: Experiment, split: str, seed: int) -> list[dict[str, Any]]:
    """All measures of `text_quality.py` of samples beside a split; the samples are written to `quality.jsonl`."""
    parts = experiment.model, experiment.params, experiment.tokenizer
    sampler = Sampler(*parts, batch_size=BATCH_SIZE, earlier_step=experiment.earlier_step)
    streams = (load_tokens(experiment.workdir, name)[0] for name in ("train", split))
    train, held_out = (token_ids(stream, bos_or_marked(stream, experiment.tokenizer.bos_id)) for stream in streams)
    with Progress("sample", unit="texts", log=experiment.workdir / "log.txt") as progress:
        results, records = measure_quality(sampler, train, held_out, seed=seed, advance=progress.advance)
    origin = {"split": split, "step": experiment.step}
    path = experiment.workdir / "quality.jsonl"
    _is_written(path, lambda: write_samples(path, [record | origin for record in records]))
    return results


def describe(result: Mapping[str, Any], width: int | None = None) -> str:
    """The result of `evaluate`, human-readable, in lines: with each measure the 95 % interval where it is known.

    A table that is wider than `width` (None: the terminal; 0: as wide as it likes) becomes two lines for each row.
    """
    width = stdout_width() if width is None else width
    shown = {name: value for name, value in result.items() if name != "quality" and not name.endswith(STANDARD_ERROR)}
    lines = [
        f"{name:>{NAME_WIDTH}}  {_with_interval(name, value, result)}{_caution(name, value, result)}"
        for name, value in shown.items()
    ]
    if 0 < result.get("texts", 0) < min(result.get("documents", 0), FEW_TEXTS):
        lines.append(
            f"the documents are passages of {result['texts']} text{'s' * (result['texts'] != 1)}: "
            "the loss says little about any other"
        )
    for quality in result.get("quality", ()):
        header, rows = quality_rows(quality)
        cells = [["", *header], *rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header) + 1)]
        lines.append(
            f"{quality['num_samples']} samples at temperature {quality['temperature']:g}, {quality['words']:,} words"
        )
        table = []
        for name, *values, verdict in cells:
            columns = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=False))
            table.append(f"  {name:<{widths[0]}}  {columns}  {verdict}")
        if width and max(map(len, table)) > width:
            table = []
            for name, samples, held_out, *_, allowed, verdict in rows:
                table += [f"  {name}", f"    {samples} (held-out {held_out}, range {allowed}): {verdict}"]
        lines += table
    if result.get("quality"):
        lines.append(NOT_TESTED)
    return "\n".join(lines)


def _caution(name: str, value: Any, result: Mapping[str, Any]) -> str:
    """Why a word perplexity says nothing about the model: it is of text without words, or of few of them."""
    words, num_bytes = result.get("words") or 0, result.get("bytes") or 0
    if name != "word_perplexity" or value is None or not words:
        return ""
    if num_bytes > LONG_WORD * words:
        return f" (says nothing: a word of this text has {num_bytes / words:,.0f} bytes)"
    if value > (LARGE if words < FEW_WORDS else HARDLY_LEARNED):
        return f" (large, for it is exp of {math.log(value):.1f} nats a word, of {words:,} words)"
    return ""


def _with_interval(name: str, value: Any, result: Mapping[str, Any]) -> str:
    """A value as text, with half the width of its 95 % interval where the standard error is known."""
    text = "–" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value}"
    if name + STANDARD_ERROR not in result:
        return text
    error = result[name + STANDARD_ERROR]
    return f"{text} ± {1.96 * error:,.4f}" if error is not None else f"{text} ± –"
