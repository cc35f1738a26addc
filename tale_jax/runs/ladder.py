"""Small runs on a text, from which follows what a long one will reach, of which size and how many tokens.

python launch/ladder.py --config=configs/files.py --config.corpus.path=my-texts/ --out=experiments/ladder --minutes=480

The rungs cost a small share of the minutes that are asked about. Each level of them takes half the time of the one
above; most have two runs, the size that looks best and the one beside it, so that the effects of weights and of text
can be told apart. A law of losses is fitted to them (`planning/scaling_law.py`), and predicts. To see how far it can be
trusted it first predicts the largest rung from the others; with `check` also the run that was asked about, of some
eighteen times that, which is then trained.

`out` holds `plan.json` (what is to be run), `text/` (the prepared text), `rungs/NAME/` (a workdir each), `ladder.json`
and `ladder.png`. The same command goes on with a ladder that was interrupted.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tale_jax.config import Config, change, leaves
from tale_jax.data.prepare import Prepared, link_prepared, prepare, with_vocab_size
from tale_jax.hardware.backend import Backend
from tale_jax.planning.autotune import (
    MIN_STEPS,
    SHAPE_SETTINGS,
    SHAPES,
    Candidate,
    find_best,
    make_candidate,
    measure_cost,
    num_weights,
    step_flops,
    with_size,
)
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.scaling_law import Bootstrap, KnownLaw, LossLaw, Rung, default_law, law_file, save_law
from tale_jax.runs.engines.jobs import End, Engine, Job, Resources, last_line, make_engine, make_job
from tale_jax.runs.plots import compact, plot_ladder
from tale_jax.runs.records import read_metrics
from tale_jax.utils.files import json_line, json_object, write_atomically
from tale_jax.utils.format import format_duration
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.progress import Progress
from tale_jax.utils.settings import mistake
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.streams import notice, say, table_console

# Share of the time of the largest rung, and which sizes: the one that looks best (0), the next larger or smaller one.
LEVELS = ((1.0, (0,)), (0.5, (0, 1)), (0.25, (0, -1)), (0.125, (0, 1)))
RUNG_SHAPES = ((2, 64), (3, 96), *SHAPES)  # layers and width


@dataclasses.dataclass
class Ladder:
    """A ladder that was run, as `ladder.json` has it.

    Attributes:
      minutes: of the run that is asked about; `share` of them is what all rungs take.
      rungs: by name, of each `num_weights`, `tokens`, `passes`, `bits_per_byte`, what the law says (`predicted`) and
        `seconds`.
      held_out: the largest rung, as the others predict it: `name`, `bits_per_byte`, `predicted`, `lower`, `upper`.
      answer: the run to choose, and `others` of the sizes beside it: `num_layers`, `embed_dim`, `num_weights`,
        `tokens`, `passes`, `bits_per_byte`, `lower`, `upper`.
      check: as `held_out`, for the run of the minutes, where it was trained afterwards; None: it was not.
      law: the numbers of `LossLaw`; `noise` is the relative deviation of the rungs from it.
      cost: seconds of the rungs' steps over those of the minutes; to start, compile and score each comes on top.
    """

    minutes: float
    share: float
    rungs: dict[str, dict[str, Any]]
    held_out: dict[str, Any]
    answer: dict[str, Any]
    check: dict[str, Any] | None
    law: dict[str, float]
    noise: float
    cost: float


@dataclasses.dataclass(frozen=True)
class _Context:
    """What all rungs share."""

    config: Config
    out: Path
    prepared: Prepared
    backend: Backend
    overrides: Collection[str]
    engine: Engine

    @property
    def text(self) -> Any:
        return self.prepared.manifests["train"]

    def laws(self, rungs: Collection[Rung]) -> Bootstrap:
        """The laws that these runs allow; of a text that was drawn with known probabilities, its entropy is known."""
        nats_per_byte = self.prepared.manifests["valid"].entropy.get("nats_per_byte", 0.0)
        return Bootstrap(list(rungs), entropy=nats_per_byte / math.log(2))

    def config_of(self, rung: Mapping[str, Any]) -> Config:
        """The config of a rung: its size and length, and what follows from these."""
        sized = with_size(self.config, rung["num_layers"], rung["embed_dim"], self.overrides)
        steps, law = rung["total_steps"], default_law().law
        config = make_candidate(change(sized, {"minutes": 0.0}), steps, 0.0, self.prepared, law, self.overrides).config
        rare = {"evaluate.every_steps": 0, "sample.every_steps": 0, "checkpoint.every_steps": max(200, MIN_STEPS)}
        return change(config, rare)

    def rung_of(self, result: Mapping[str, Any]) -> Rung:
        """A result as laws are fitted to it."""
        read_bytes = result["passes"] * self.text.bytes
        return Rung(result["num_weights"], read_bytes, self.text.bytes, result["bits_per_byte"])


def run_ladder(
    config: Config,
    out: Path,
    backend: Backend,
    minutes: float | int = 480.0,
    share: float = 0.15,
    check: bool = False,
    overrides: Collection[str] = (),
    engine: Engine | None = None,
) -> Ladder | int:
    """Trains what is missing of a ladder and says what follows from it; or the number of the signal that stopped it.

    Args:
      config: the recipe, as `Config.build` makes it; sizes and lengths are chosen here.
      out: folder of the ladder; it is made when missing.
      minutes: of the run that is asked about.
      share: of these minutes, that the rungs may take.
      check: whether the run of the minutes is trained as well, and compared with its prediction.
      overrides: dotted names of settings that the user gave, which are left alone.
      engine: where the rungs are trained; None: on this machine, one after the other.

    Raises:
      ValueError: one line, for minutes that are too few for rungs, a size or length that the user gave, or another
        ladder in `out`; and as `train`.
      OSError: `out` cannot be written.
    """
    if given := [name for name in ("total_steps", "passes", "minutes", *SHAPE_SETTINGS) if name in overrides]:
        raise ValueError(f"{given[0]} is what a ladder chooses; leave --config.{given[0]} out")
    if not 0 < share < 1:
        raise ValueError(f"share={share:g} must be above 0 and below 1; try --share=0.15")
    if not 0 < minutes < 1e6:
        raise ValueError(f"minutes={minutes:g} must be above 0; try --minutes=480")
    config = change(config, {"minutes": float(minutes), "total_steps": 0, "passes": 1.0})
    with writer_lock(out, "ladder", lambda folder: list(folder.glob("plan.json"))):
        context, plan = _plan(config, out, backend, share, overrides, engine or make_engine("local", Resources()))
        results = _run(context, plan["rungs"])
        if isinstance(results, int):
            return results
        rungs = {name: context.rung_of(result) for name, result in results.items()}
        laws = context.laws(rungs.values())
        for name, result in results.items():
            result["predicted"] = laws.law.predict(*rungs[name][:3])
        ladder = Ladder(
            minutes=float(minutes),
            share=share,
            rungs=results,
            held_out=_held_out(context, rungs),
            answer=_answer(context, laws),
            check=None,
            law=dataclasses.asdict(laws.law),
            noise=laws.noise,
            cost=sum(result["seconds"] for result in results.values()) / (60 * minutes),
        )
        _keep(context, KnownLaw(laws.law, tuple(rungs.values()), f"a ladder of {len(rungs)} runs on this text"))
        if check:
            checked = _check(context, plan, laws)
            if isinstance(checked, int):
                return checked
            ladder.check = checked
        values = dataclasses.asdict(ladder)
        write_atomically(out / "ladder.json", json.dumps(values, indent=2) + "\n")
        plot_ladder(values, out / "ladder.png")
    return ladder


def _plan(
    config: Config, out: Path, backend: Backend, share: float, overrides: Collection[str], engine: Engine
) -> tuple[_Context, dict[str, Any]]:
    """What the rungs share, and which they are: decided once, so that a ladder goes on as it began."""
    wanted = {"minutes": config.minutes, "share": share, "settings": dict(leaves(config))}
    file, text = out / "plan.json", out / "text"
    if file.is_file():
        plan = json_object(file.read_bytes(), file, "give another --out")
        if differing := [name for name in wanted if plan.get(name) != wanted[name]]:
            raise ValueError(f"out={out} holds a ladder of other {differing[0]}; give another --out")
        config = change(config, {"tokenizer.vocab_size": plan["vocab_size"]})
        return _Context(config, out, prepare(config, text), backend, overrides, engine), plan
    if "tokenizer.vocab_size" not in overrides:
        config, reason = with_vocab_size(config, text)
        notice(reason)
    context = _Context(config, out, prepare(config, text), backend, overrides, engine)
    timed = change(with_size(config, *SHAPES[0]), {"total_steps": MIN_STEPS})
    cost = measure_cost(timed, backend, choose_precision(backend, config.precision)[0])
    if cost is None:
        raise mistake(
            "batch_size", config.batch_size, "fit the smallest model into memory", "try --config.batch_size=1"
        )
    plan = wanted | {
        "vocab_size": config.tokenizer.vocab_size,
        "seconds_per_flop": cost.step_seconds / step_flops(timed),
        "largest_seconds": 60 * config.minutes * share / sum(part * len(sizes) for part, sizes in LEVELS),
        "rungs": {},
    }
    for part, sizes in LEVELS:
        for rung in _best_sizes(context, plan, part * plan["largest_seconds"], default_law().law, sizes):
            plan["rungs"][_name(rung)] = rung
    write_atomically(file, json.dumps(plan, indent=2) + "\n")
    return context, plan


def _best_sizes(
    context: _Context, plan: Mapping[str, Any], seconds: float, law: LossLaw, sizes: Sequence[int] = (0,)
) -> list[dict[str, Any]]:
    """The best size for so many seconds of steps, or those beside it, with their lengths.

    Raises ValueError, in one line, where there is time for few steps only.
    """
    runs = []
    for num_layers, embed_dim in RUNG_SHAPES:
        config = with_size(context.config, num_layers, embed_dim)
        steps = int(seconds / (plan["seconds_per_flop"] * step_flops(config)))
        loss = make_candidate(config, steps, 0.0, context.prepared, law).bits_per_byte
        runs.append((loss, {"num_layers": num_layers, "embed_dim": embed_dim, "total_steps": steps}))
    best = min(range(len(runs)), key=lambda i: runs[i][0])
    best = min(max(best, -min(sizes)), len(runs) - 1 - max(sizes))
    chosen = [runs[best + i][1] for i in sizes]
    if (fewest := min(rung["total_steps"] for rung in chosen)) < MIN_STEPS:
        minutes = context.config.minutes * 1.2 * MIN_STEPS / max(1, fewest)
        rule = f"leave each rung {MIN_STEPS} steps"
        raise mistake("minutes", context.config.minutes, rule, f"try --minutes={math.ceil(minutes)}")
    return chosen


def _run(context: _Context, rungs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]] | int:
    """What each rung reached, by its name; the signal that stopped them.

    Raises ValueError, in one line, where one of them fails.
    """
    results, jobs, failures = {}, [], {}
    for number, (name, rung) in enumerate(rungs.items(), 1):
        workdir = context.out / "rungs" / name
        finished = workdir / "rung.json"
        if finished.is_file():
            results[name] = json_object(finished.read_bytes(), finished, "remove it, and the rung is scored again")
            continue
        config = context.config_of(rung)
        notice(
            f"rung {number} of {len(rungs)}, {name}: {compact(num_weights(config))} weights, "
            f"{config.total_steps:,} steps"
        )
        link_prepared(context.prepared.workdir, workdir)
        job = make_job(name, config, dict.fromkeys(context.overrides), workdir, context.out)
        if job.score.is_file():
            results[name] = _reached(context, rung, job)
        else:
            jobs.append(job)
    with StopSignals() as signals, Progress("rungs", total=len(jobs), unit="rungs", every_seconds=60.0) as progress:

        def on_end(job: Job, end: End) -> None:
            if job.score.is_file():
                results[job.name] = _reached(context, rungs[job.name], job)
                progress.print(f"{job.name}: {results[job.name]['bits_per_byte']:.4f} bits/byte")
                progress.advance()
            elif not signals.number:
                failures[job.name] = f"{end.reason or 'no result'}: {last_line(job.log) or 'it said nothing'}"

        context.engine.run(jobs, on_end, signals)
    if signals.number:
        return signals.number
    for name, reason in failures.items():
        log = context.out / "logs" / f"{name}.txt"
        raise ValueError(f"rung {name} failed ({reason}); see {log}, and give the same command again to go on")
    return {name: results[name] for name in rungs}


def _reached(context: _Context, rung: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """What a rung reached that was trained and scored, which is kept in `rung.json`."""
    scores = json_object(job.score.read_bytes(), job.score, "remove it, and the rung is scored again")
    config = context.config_of(rung)
    rates = [record["tokens_per_second"] for record in read_metrics(job.workdir)["train"]]
    tokens = config.total_steps * config.tokens_per_step
    result = dict(rung) | {
        "num_weights": num_weights(config),
        "tokens": tokens,
        "passes": tokens / context.text.tokens,
        "bits_per_byte": scores["bits_per_byte"],
        "seconds": tokens / statistics.median(rates),
    }
    write_atomically(job.workdir / "rung.json", json.dumps(result, indent=2) + "\n")
    return result


def _held_out(context: _Context, rungs: Mapping[str, Rung]) -> dict[str, Any]:
    """The rung of the most work, as the others predict it."""
    name = max(rungs, key=lambda name: rungs[name].num_weights * rungs[name].read_bytes)
    others = context.laws([rung for other, rung in rungs.items() if other != name])
    return _compared(name, rungs[name], others)


def _compared(name: str, rung: Rung, laws: Bootstrap) -> dict[str, Any]:
    """A run beside what laws predict of it."""
    found = laws.predict(*rung[:3])
    names = {"predicted": found.bits_per_byte, "lower": found.lower, "upper": found.upper}
    return {"name": name, "bits_per_byte": rung.bits_per_byte} | names


def _answer(context: _Context, laws: Bootstrap) -> dict[str, Any]:
    """The run of the minutes that were asked about: its size, its tokens, and what it will reach."""
    end_time = time.monotonic() + 60 * context.config.minutes
    best, others, _ = find_best(
        context.config, context.prepared, context.backend, end_time, context.overrides, law=laws.law
    )
    others = sorted(others, key=lambda run: abs(math.log(num_weights(run.config) / num_weights(best.config))))[:2]

    def described(run: Candidate) -> dict[str, Any]:
        config = run.config
        found = laws.predict(num_weights(config), run.passes * context.text.bytes, context.text.bytes)
        return {
            "num_layers": config.model.num_layers,
            "embed_dim": config.model.embed_dim,
            "num_weights": num_weights(config),
            "tokens": config.total_steps * config.tokens_per_step,
            "passes": run.passes,
            **found._asdict(),
        }

    near = [described(run) for run in others if run.config.total_steps]
    return described(best) | {"others": sorted(near, key=lambda run: run["num_weights"])}


def _check(context: _Context, plan: Mapping[str, Any], laws: Bootstrap) -> dict[str, Any] | int:
    """The run that was asked about, beside what was predicted of it; the signal that stopped it.

    Its size and length follow from the plan and the rungs alone, so an interrupted one is the same when it goes on.
    """
    [rung] = _best_sizes(context, plan, 60 * context.config.minutes, laws.law)
    name = _name(rung)
    notice(f"the run of {format_duration(60 * context.config.minutes)} that was asked about")
    results = _run(context, {name: rung})
    if isinstance(results, int):
        return results
    return _compared(name, context.rung_of(results[name]), laws) | results[name]


def _keep(context: _Context, known: KnownLaw) -> None:
    """Leaves the law where `train.py --config.minutes` finds it for this text."""
    with contextlib.suppress(OSError):  # the cache is optional
        if (path := law_file(context.text.corpus)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_law(path, known)


def _name(rung: Mapping[str, Any]) -> str:
    return "{num_layers}x{embed_dim}-{total_steps}".format(**rung)


def describe_ladder(ladder: Ladder) -> str:
    """What a ladder says, human-readable, in lines."""
    answer, held_out = ladder.answer, ladder.held_out
    lines = [
        f"In {format_duration(60 * ladder.minutes)} on this machine: {_described(answer)}",
        *(f"  instead {_described(run)}" for run in answer["others"]),
        f"The largest rung, predicted from the others: {_off(held_out)}",
    ]
    if ladder.check:
        lines.append(f"The run of {format_duration(60 * ladder.minutes)}, predicted before: {_off(ladder.check)}")
    return "\n".join([*lines, f"The steps of the rungs took {ladder.cost:.1%} of that time."])


def _described(run: Mapping[str, Any]) -> str:
    shape = f"{compact(run['num_weights'])} weights ({run['num_layers']} layers of {run['embed_dim']})"
    reach = f"{run['bits_per_byte']:.3f} bits/byte ({run['lower']:.3f} to {run['upper']:.3f})"
    return f"{shape}, {compact(run['tokens'])} tokens ({run['passes']:.1f} passes) reach {reach}"


def _off(compared: Mapping[str, Any]) -> str:
    predicted = f"{compared['predicted']:.3f} ({compared['lower']:.3f} to {compared['upper']:.3f})"
    off = compared["bits_per_byte"] / compared["predicted"] - 1
    return f"{predicted}, measured {compared['bits_per_byte']:.3f} bits/byte ({off:+.1%})"


def print_ladder(ladder: Ladder, out: Path, as_json: bool = False) -> None:
    """Prints a row for each rung, and what follows from them; or all of it as one JSON object on one line."""
    if as_json:
        return print(json_line(dataclasses.asdict(ladder)))
    table = rich.table.Table(box=rich.box.SIMPLE, title="Rungs", title_justify="left")
    for title in ("weights", "tokens", "passes", "bits/byte", "law", "off by", "time"):
        table.add_column(title, justify="right")
    for rung in ladder.rungs.values():
        table.add_row(
            compact(rung["num_weights"]),
            compact(rung["tokens"]),
            f"{rung['passes']:.2f}",
            f"{rung['bits_per_byte']:.3f}",
            f"{rung['predicted']:.3f}",
            f"{rung['bits_per_byte'] / rung['predicted'] - 1:+.1%}",
            format_duration(rung["seconds"]),
        )
    table_console().print(table)
    say(f"{describe_ladder(ladder)}\n{out / 'ladder.json'} has all of it, {out / 'ladder.png'} draws it")
