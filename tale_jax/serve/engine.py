"""Continuous batching: requests join and leave the rows of a decode batch while the others go on.

One thread for each model owns the rows. They lie in blocks of a fixed number, each block one call of one compiled
program (`Sampler.decode_with_top`), whoever is in it: so a row's numbers do not depend, to the bit, on what runs beside
it. Each row has a cache ring, a key and sampling parameters of its own. Between chunks of tokens the thread takes
requests from a bounded queue, first come first served, reads their prompts (prefill) and lets finished or given-up rows
go. The rows of a block share their weights; blocks may differ in them (another checkpoint, an ablated head).

    engine = Engine(sampler, weights_of)
    engine.start()
    engine.submit([Job(ids=[1, 5, 9], limits=SampleSettings(max_tokens=20), on_event=print)])
    engine.stop()
"""

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tale_jax.inference.sampler import DecodeState, Sampler, SampleSettings, SampleText, TopTokens, power_of_two
from tale_jax.inference.sampling import SamplingParams

CHUNK = 8  # tokens between two looks at the queue
MAX_TOP = 20  # likeliest tokens of a position
MIN_PREFILL = 16  # tokens of the shortest prefill program


class QueueFull(Exception):
    """No more requests are taken for now."""


class TokenScore(NamedTuple):
    """One token, and what the model gave it and the likeliest others: log-probabilities in nats.

    `before` is the model's own softmax; `after` follows bias, penalties, temperature and filters (None for a token of
    a prompt, which was not sampled). `end` is where the token's text ends, in characters from the start of its text.
    """

    id: int
    before: float | None
    after: float | None
    top: tuple[tuple[int, float, float | None], ...]  # (id, before, after), the likeliest first
    end: int


class Delta(NamedTuple):
    """New text of a job, the tokens that make it up, and on the last one why the text ends."""

    text: str
    tokens: Sequence[TokenScore]
    finish_reason: str | None  # "eos", "stop" or "length"
    num_tokens: int  # sampled so far


class Prompt(NamedTuple):
    """The prompt has been read: its tokens but BOS, scored where the job asked for it."""

    tokens: Sequence[TokenScore]


class Failure(NamedTuple):
    """The job cannot go on, for a reason that is not the client's."""

    message: str


Event = Prompt | Delta | Failure


@dataclasses.dataclass(eq=False)
class Job:
    """One text to write.

    Attributes:
      ids: what the model reads first, with BOS.
      limits: `max_tokens`, `stop`, and the sampling parameters that `SampleSettings` has.
      on_event: called by the engine's thread: once with Prompt, then with Deltas, or with Failure.
      seed: of the random numbers, 64 bits; `number` tells the texts of one seed apart.
      top: likeliest tokens that each token is told with; None: not even its own `after`, which costs least.
      score_prompt: the tokens of the prompt are scored, too.
      tell_bos: BOS stands among them, without a score, as a prompt of ids that begins with it wants it.
      max_tokens: 0 only reads the prompt; otherwise that of `limits`.
      weights: key of the weights to use.
    """

    ids: Sequence[int]
    limits: SampleSettings
    on_event: Callable[[Event], None]
    seed: int = 0
    number: int = 0
    top: int | None = None
    score_prompt: bool = False
    tell_bos: bool = False
    max_tokens: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    weights: Hashable = None
    cancelled: bool = False


class Engine:
    """The rows of one model.

    Args:
      sampler: the model's compiled programs.
      weights_of: the decoder's weights (`Sampler.load`) for the key of a job; called by the engine's thread.
      rows: texts decoded at a time, in all.
      block_rows: rows of a block. On a CPU a row costs about the same in a small block as in a large one, and rows that
        nobody uses cost as much; a GPU decodes many rows in the time of one.
      max_queue: jobs that wait at most.
    """

    def __init__(
        self,
        sampler: Sampler,
        weights_of: Callable[[Any], Any],
        *,
        rows: int = 32,
        block_rows: int = 4,
        max_queue: int = 256,
    ):
        self.sampler, self.weights_of, self.max_queue = sampler, weights_of, max_queue
        self.context, self.vocab_size = sampler.context, sampler.model.vocab_size
        self.top = min(MAX_TOP, self.vocab_size)
        self.blocks = [_Block(self, block_rows) for _ in range(max(1, rows // block_rows))]
        self.rows = len(self.blocks) * block_rows
        self.prompt_tokens = self.sampled_tokens = 0
        self._insert = jax.jit(_insert_row)
        self._prefill = jax.jit(self._read_prompt, static_argnames=("score",))
        self._queue: collections.deque[Job] = collections.deque()
        self._condition, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # What other threads call.

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs into the queue, all or none. Raises QueueFull."""
        with self._condition:
            if len(self._queue) + len(jobs) > self.max_queue:
                raise QueueFull
            self._queue.extend(jobs)
            self._condition.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Gives jobs up: those that wait leave the queue now, those that run their rows after the chunk under way."""
        with self._condition:
            for job in jobs:
                job.cancelled = True
                with contextlib.suppress(ValueError):
                    self._queue.remove(job)

    def stop(self) -> None:
        """Ends the thread after the chunk under way; jobs that are left get a Failure."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return sum(block.used for block in self.blocks)

    @property
    def idle(self) -> bool:
        with self._condition:
            return not self._queue and not self.running

    def warm_up(self, weights: Any) -> None:
        """Compiles what requests need: decoding, and prefill of each length. Before `start`."""
        block, length = self.blocks[0], MIN_PREFILL
        block.state = self._empty_state(weights, block.size)
        while True:
            length = min(length, self.context)
            row, _ = self._prefill(weights, np.zeros((1, length), np.int32), np.int32(1), score=False)
            if length == self.context:
                break
            length *= 2
        for _ in range(2):  # a state that came from a program counts as another argument than the first, empty one
            block.state = self._insert(block.state, row, 0)
            block.collect(block.decode(weights))

    # The engine's thread.

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self.running and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    left = [*self._queue]
                    self._queue.clear()
                    break
            self._admit()
            under_way = [(block, self._try(block, block.decode)) for block in self.blocks if block.used]
            for block, results in under_way:
                if results is not None:
                    self._try(block, lambda _, block=block, results=results: block.collect(results))
        for job in left:
            _tell(job, Failure("the server was stopped"))
        for block in self.blocks:
            block.fail("the server was stopped")

    def _try(self, block: "_Block", act: Callable[[Any], Any]) -> Any:
        """What `act` gives, or None, and the end of all jobs in the block, when it fails."""
        try:
            return act(block.weights)
        except Exception:  # out of memory, or a bug: the server must live on
            logging.exception("a block of rows failed")
            block.fail("the model could not go on")
            return None

    def _admit(self) -> None:
        """Gives free rows to the jobs that wait, in their order."""
        while True:
            with self._condition:
                job = self._queue[0] if self._queue else None
                block = job and self._block_for(job)
                if job is None or block is None:
                    return
                self._queue.popleft()
                text = block.reserve(job)
            try:
                if block.weights is None:
                    block.weights = self.weights_of(job.weights)
                self._join(block, text)
            except Exception:
                logging.exception("a prompt could not be read")
                block.release(text)
                _tell(job, Failure("the model could not read the prompt"))

    def _block_for(self, job: Job) -> "_Block | None":
        """A block with these weights and a free row, the fullest first; else an empty one."""
        free = [block for block in self.blocks if block.used < block.size]
        mine = [block for block in free if block.used and block.key == job.weights]
        if mine:
            return max(mine, key=lambda block: block.used)
        empty = [block for block in free if not block.used]
        return next((block for block in empty if block.key == job.weights), empty[0]) if empty else None

    def _join(self, block: "_Block", text: "_RowText") -> None:
        """Reads the prompt of a job and puts it into its row."""
        job = text.job
        length = len(job.ids)
        padded = min(self.context, power_of_two(max(length, MIN_PREFILL)))
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, :length] = job.ids
        row, scores = self._prefill(block.weights, tokens, np.int32(length), score=job.score_prompt)
        if job.max_tokens:
            if block.state is None:
                block.state = self._empty_state(block.weights, block.size)
            block.state = self._insert(block.state, row, text.row)
        self.prompt_tokens += length
        _tell(job, Prompt(self._prompt_scores(job, scores) if scores is not None else ()))
        if not job.max_tokens:
            block.release(text)
            _tell(job, Delta("", (), "length", 0))

    def _prompt_scores(self, job: Job, scores: TopTokens) -> list[TokenScore]:
        """Those of all tokens, BOS only where it is asked for; the first of a prompt without BOS has no score."""
        ids, before, own = (np.asarray(x) for x in (scores.ids, scores.before, scores.chosen_after))
        result, end, top = [], 0, job.top or 0
        utf8 = SampleText.decoder()
        for index, token in enumerate(job.ids):
            if not index and token == self.sampler.tokenizer.bos_id and not job.tell_bos:
                continue
            end += len(utf8.decode(self.sampler.tokenizer.token_bytes[token]))
            if not index:
                result.append(TokenScore(token, None, None, (), end))
                continue
            pairs = zip(ids[index - 1, :top].tolist(), before[index - 1, :top].tolist(), strict=True)
            likeliest = tuple((other, logprob, None) for other, logprob in pairs)
            result.append(TokenScore(token, float(own[index - 1]), None, likeliest, end))
        return result

    # Programs.

    def _empty_state(self, weights: Any, rows: int) -> DecodeState:
        tokens = jax.ShapeDtypeStruct((1, MIN_PREFILL), jnp.int32)
        row = jax.eval_shape(self._read_prompt, weights, tokens, jax.ShapeDtypeStruct((), jnp.int32))[0]
        return jax.tree_util.tree_map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), row)

    def _read_prompt(
        self, weights: Any, tokens: Any, length: Any, score: bool = False
    ) -> tuple[DecodeState, TopTokens | None]:
        """The state of one row after its prompt; with `score` the likeliest tokens after each position, and in
        `chosen_after` the log-probability of the token that did follow."""
        seen = jnp.zeros(self.vocab_size, bool).at[tokens[0]].max(jnp.arange(tokens.shape[1]) < length)
        state, logits = self.sampler.prefill_with_logits(weights, tokens, length, seen, 1, all_logits=score)
        state = state.replace(
            length=state.length[None], step=state.step[None], counts=jnp.zeros((1, self.vocab_size), jnp.int32)
        )
        if not score:
            return state, None
        values, likeliest = jax.lax.top_k(logits, self.top)
        log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        following = jnp.roll(tokens[0], -1)[:, None]
        own = (jnp.take_along_axis(logits, following, axis=-1) - log_sum)[:, 0]
        return state, TopTokens(likeliest, values - log_sum, values - log_sum, own)


class _Block:
    """Rows that one call decodes."""

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size = engine, size
        self.texts: list[_RowText | None] = [None] * size
        self.key: Hashable = None
        self.weights: Any = None
        self.state: Any = None
        self.used = 0  # rows with a text
        self._numbers_there: Any = None  # the device's copies of what follows, until a row changes
        self._keys = np.zeros((size, 2), np.uint32)
        self._numbers = np.zeros(size, np.int32)
        self._sampling = {  # of each row, as SamplingParams
            "temperature": np.zeros(size, np.float32),
            "top_k": np.zeros(size, np.int32),
            "top_p": np.ones(size, np.float32),
            "min_p": np.zeros(size, np.float32),
            "repetition_penalty": np.ones(size, np.float32),
            "frequency_penalty": np.zeros(size, np.float32),
            "presence_penalty": np.zeros(size, np.float32),
            "logit_bias": np.zeros((size, engine.vocab_size), np.float32),
        }

    def reserve(self, job: Job) -> "_RowText":
        """A free row, with the job's numbers."""
        if not self.used:
            if self.key != job.weights:
                self.weights = None
            self.key = job.weights
        row = self.texts.index(None)
        limits = dataclasses.replace(job.limits, top_k=min(job.limits.top_k, self.engine.vocab_size))
        text = self.texts[row] = _RowText(row, job, self.engine.sampler)
        self.used, self._numbers_there = self.used + 1, None
        self._keys[row] = job.seed >> 32 & 0xFFFFFFFF, job.seed & 0xFFFFFFFF
        self._numbers[row] = job.number
        for name, array in self._sampling.items():
            if name != "logit_bias":
                array[row] = getattr(job if name in ("frequency_penalty", "presence_penalty") else limits, name)
        bias = self._sampling["logit_bias"]
        bias[row] = 0
        for token, value in job.logit_bias.items():
            bias[row, token] = value
        return text

    def release(self, text: "_RowText") -> None:
        """A row that nobody uses goes on greedily, which costs least."""
        self.texts[text.row] = None
        self.used, self._numbers_there = self.used - 1, None
        for name, value in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("repetition_penalty", 1)):
            self._sampling[name][text.row] = value

    def fail(self, message: str) -> None:
        self.state = None
        for text in self.texts:
            if text:
                self.release(text)
                _tell(text.job, Failure(message))

    def decode(self, weights: Any) -> Any:
        """Starts a chunk, and returns what will be its results: the likeliest tokens only where a text wants them."""
        if self._numbers_there is None:  # copies, which do not change with the rows while a chunk is under way
            here = np.bool_(any(text and text.job.top is not None for text in self.texts)), self._keys, self._numbers
            self._numbers_there = jax.device_put(jax.tree_util.tree_map(np.array, (*here, self._sampling))), here[0]
        (wanted, keys, numbers, sampling), is_wanted = self._numbers_there
        self.state, tokens, logprobs, likeliest = self.engine.sampler.decode_with_top(
            weights,
            self.state,
            keys,
            numbers,
            SamplingParams(**sampling),
            wanted=wanted,
            chunk=CHUNK,
            top=self.engine.top,
        )
        return tokens, logprobs, likeliest if is_wanted else None

    def collect(self, results: Any) -> None:
        """Passes a chunk's tokens on."""
        tokens, logprobs, likeliest = jax.device_get(results)
        for text in self.texts:
            if text is None:
                continue
            if text.job.cancelled:
                self.release(text)
                continue
            if not np.isfinite(logprobs[:, text.row]).all():
                self.release(text)
                _tell(text.job, Failure("the model gives no finite logits: its training has diverged"))
                continue
            before = text.num_tokens
            delta = text.add(tokens[:, text.row], logprobs[:, text.row], likeliest)
            self.engine.sampled_tokens += text.num_tokens - before
            if delta and delta.finish_reason:
                self.release(text)
            if delta:
                _tell(text.job, delta)


class _RowText:
    """A job in its row, and its text so far."""

    def __init__(self, row: int, job: Job, sampler: Sampler):
        self.row, self.job = row, job
        self._text = SampleText(0, sampler.tokenizer, job.limits)
        self._held: list[TokenScore] = []  # tokens whose text was not passed on yet
        self._eos_id = sampler.tokenizer.eos_id

    @property
    def num_tokens(self) -> int:
        return self._text.tokens

    def add(self, tokens: Any, logprobs: Any, likeliest: TopTokens | None) -> Delta | None:
        """The delta that a chunk of tokens brings, if any."""
        top = self.job.top
        for index, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            self._text.add_tokens([token], [logprob])
            after, others = None, ()
            if top is not None and likeliest is not None:
                after = float(likeliest.chosen_after[index, self.row])
                columns = (x[index, self.row, :top].tolist() for x in likeliest[:3])
                others = tuple(zip(*columns, strict=True))
            self._held.append(TokenScore(token, logprob, after, others, len(self._text.text)))
            if self._text.finish_reason:
                break
        delta = self._text.next_delta()
        if delta is None:
            return None
        passed, reason = self._text.num_passed, self._text.finish_reason
        if reason:
            ready, self._held = self._held, []
            if reason == "stop":  # only tokens that have some of the text before the stop text
                starts = [0, *(score.end for score in ready)]
                ready = [s for s, start in zip(ready, starts, strict=False) if start < passed]
        else:
            count = sum(score.end <= passed for score in self._held)
            ready, self._held = self._held[:count], self._held[count:]
        return Delta(delta.text, ready, reason or None, self.num_tokens)


def _insert_row(state: DecodeState, row_state: DecodeState, row: Any) -> DecodeState:
    def put(all_rows: Any, one: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(all_rows, one.astype(all_rows.dtype), row, axis=0)

    return jax.tree_util.tree_map(put, state, row_state)


def _tell(job: Job, event: Event) -> None:
    with contextlib.suppress(RuntimeError):  # the listener's event loop has ended
        if not job.cancelled:
            job.on_event(event)
