"""Text from a model: the one sampler behind `launch/sample.py`, the samples along training and the judged tales.

A prompt is read in one pass (prefill) that fills the key/value cache; then tokens come in compiled chunks: the draw
(`sampling.py`) happens on the device, and the host looks in once a chunk, to spell the text, find its end and pass it
on. Prompts, rows and the slots of the cache are padded to powers of two, and the settings of the draw are arguments of
the program: no prompt, seed or setting of its own makes it compile again. Text may outgrow the context of the model:
the cache is a ring, and each token looks back on the last `seq_len`.

Between the steps, weights and cache are kept apart by layer. The model wants them stacked, and XLA sees through a stack
that is made and sliced in one program; of a stack that comes from outside it copies every layer for every token, which
made decoding three times slower on a CPU. For the same reason weights are converted to the compute dtype, and a tied
embedding is transposed to a head, before the first token: done inside the loop, that was half the time of a token.

    sampler = Sampler(experiment.model, experiment.params, tokenizer)
    for piece in sampler.stream("Once", SampleSettings(max_tokens=100, temperature=0.7), seed=1):
        print(piece.text, end="", flush=True)
    samples = sampler.sample("", SampleSettings(max_tokens=255), num_samples=200)
"""

import codecs
import dataclasses
import math
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from tale_jax.data.tokenizer import Tokenizer
from tale_jax.inference.sampling import SamplingParams, sample_token
from tale_jax.model.transformer import Cache, Transformer

CHUNK = 16  # tokens between two looks of the host
MIN_SLOTS = 64  # of the cache: short texts do not look at all of a long context, and still share one program
LONG_PROMPT = ("refuse", "window")


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How to draw, and when to stop. Raises ValueError, in one line, for a value out of range.

    Attributes:
      max_tokens: drawn for one sample at most, its end mark included.
      temperature: logits are divided by it; 0 always takes the likeliest token.
      top_k: only the k likeliest tokens, and those that tie with the last of them; 0: all.
      top_p: only the likeliest tokens that together reach this probability; 1: all.
      min_p: only tokens at least this share as likely as the likeliest; 0: all.
      repetition_penalty: logits of tokens seen before are divided by it, or multiplied if negative; 1: off.
      stop: texts that end a sample, which is cut before the first of them.
      long_prompt: "refuse" a prompt longer than the context, or "window": go on from its end.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    long_prompt: str = "refuse"

    def __post_init__(self):
        for name, holds, rule, example in (
            ("max_tokens", self.max_tokens >= 1, "be at least 1", "128"),
            ("temperature", 0 <= self.temperature < math.inf, "be finite and at least 0", "0.7"),
            ("top_k", self.top_k >= 0, "be at least 0 (all tokens)", "40"),
            ("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1", "0.95"),
            ("min_p", 0 <= self.min_p <= 1, "be at least 0 and at most 1", "0.05"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be finite and above 0", "1.1"),
            ("stop", all(self.stop), "hold no empty text", "'The end.'"),
            ("long_prompt", self.long_prompt in LONG_PROMPT, f"be one of {', '.join(LONG_PROMPT)}", "window"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must {rule}; try --{name}={example}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
      text: what follows the prompt.
      tokens: drawn for it, the end mark or those of the stop text included.
      logprob: of these tokens, in nats, as the model has it: plain softmax, before penalty, temperature and filters.
      finished: by "eos" (the end mark), "stop" (a stop text) or "length" (`max_tokens`).
    """

    text: str
    tokens: int
    logprob: float
    finished: str


class TextDelta(NamedTuple):
    """The next bit of text of sample `number`; with its last one (perhaps "") comes the sample."""

    number: int
    text: str
    sample: Sample | None


class State(flax.struct.PyTreeNode):
    """What one token of each row leaves to the next: a pytree of arrays, or of their shapes."""

    layers: Any  # for each layer, keys and values of the cache, float [B, K, S, H]
    positions: Any  # the rest of the cache: int32 [B, S]
    length: Any  # int32 []
    logits: Any  # of the next token: float32 [B, V]
    seen: Any  # tokens in the prompt and the text so far: bool [B, V]
    step: Any  # tokens drawn: int32 []


class Sampler:
    """The compiled programs of a model and its tokenizer: make one, and use it for every prompt.

    Args:
      model: the decoder.
      params: its weights; None when each call brings its own.
      tokenizer: spells the prompt and the text.
      batch_size: samples drawn together at most; more of them come in groups.
      donate: the backend can reuse the memory of the cache (see `hardware/backend.py`).
    """

    def __init__(
        self, model: Transformer, params: Any, tokenizer: Tokenizer, *, batch_size: int = 32, donate: bool = False
    ):
        # The same values as the model's, in the form that is fastest for a few rows; `_load` gives it its weights.
        config = dataclasses.replace(model.config, scan_layers=False, tie_embeddings=False)
        self.model = model.clone(config=config, materialize_transposes=False, remat="none")
        # XLA on CPU multiplies one row of bfloat16 by converting all weights to float32, for two it has a product.
        self.min_rows = 2 if model.dtype == jnp.bfloat16 else 1
        self.tokenizer, self.batch_size, self.context = tokenizer, batch_size, config.seq_len
        ids, marks = np.arange(model.vocab_size), (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id)
        self._never_sampled = (np.isin(ids, marks) & (ids != tokenizer.eos_id)) | (ids >= tokenizer.vocab_size)
        self.load = jax.jit(self._load)
        self.prefill = jax.jit(self._prefill, static_argnames=("rows", "slots"))
        self.decode = jax.jit(self._decode, donate_argnums=(1,) if donate else ())
        self.compiled_shapes: set[tuple[int, int]] = set()  # numbers of rows and of slots that `decode` has run with
        self._weights = None if params is None else self.load(params)

    def sample(
        self, prompt: str, settings: SampleSettings, *, num_samples: int = 1, seed: int = 0, params: Any = None
    ) -> list[Sample]:
        """Samples that follow the prompt; see `stream`."""
        pieces = self.stream(prompt, settings, num_samples=num_samples, seed=seed, params=params)
        return [piece.sample for piece in pieces if piece.sample]

    def stream_each(
        self, prompts: Sequence[str], settings: SampleSettings, *, seed: int = 0, params: Any = None
    ) -> "Generation":
        """One sample for each prompt, drawn together in groups of `batch_size`; otherwise as `stream`."""
        if not prompts:
            raise ValueError("prompts must hold at least one; give [''] to start a document")
        generation = self.stream(prompts[0], settings, num_samples=len(prompts), seed=seed, params=params)
        generation.prompts = [self._encode_prompt(prompt, settings.long_prompt) for prompt in prompts]
        return generation

    def stream(
        self, prompt: str, settings: SampleSettings, *, num_samples: int = 1, seed: int = 0, params: Any = None
    ) -> "Generation":
        """Samples that follow the prompt, piece by piece: iterate over the result.

        Sample i of a seed is the same whatever `num_samples` is, but for the rounding of products of another shape.

        Args:
          prompt: what stands before the text, after the begin mark; "" is the start of a document.
          settings: of the draw and its end.
          num_samples: how many.
          seed: of the draws, below 2^32.
          params: weights to use instead of the sampler's own.

        Raises:
          ValueError: one line, for a prompt of whitespace or longer than the context, or a number out of range; while
            iterating, when the weights are so bad that logits are not finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1; try --num_samples=1")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed={seed} must be at least 0 and below 2^32; try --seed=0")
        ids = self._encode_prompt(prompt, settings.long_prompt)
        weights = self._weights if params is None else self.load(params)
        return Generation(self, weights, prompt, ids, settings, num_samples, seed)

    def _encode_prompt(self, prompt: str, long_prompt: str) -> list[int]:
        """The ids to start from."""
        if prompt and not prompt.strip():
            raise ValueError(f"prompt={prompt!r} must hold more than whitespace; leave it out to start a document")
        ids = [self.tokenizer.bos_id, *map(int, self.tokenizer.encode(prompt))]
        if len(ids) <= self.context:
            return ids
        if long_prompt == "refuse":
            raise ValueError(
                f"prompt of {len(ids) - 1} tokens must fit the context of {self.context}, with a begin mark before it; "
                "shorten it, or go on from its end: --long_prompt=window"
            )
        return ids[-max(1, self.context * 3 // 4) :]  # the first quarter of new text still sees all of these

    def _load(self, params: Any) -> Any:
        """The weights as decoding wants them, once: matrices in the compute dtype, layers apart, the head a matrix."""
        head = params["head"] if "head" in params else params["embedding"].T
        blocks = unstack_layers(params["blocks"], self.model.config.num_layers)
        return {**params, "head": head.astype(self.model.dtype), "blocks": _kernels_as(blocks, self.model.dtype)}

    def _forward(
        self, weights: Any, tokens: Int[Array, "B T"], cache: Cache, **how: Any
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one position, in float32, and the cache with the tokens in it."""
        params = {**weights, "blocks": stack_layers(weights["blocks"])}
        result: Any = self.model.apply({"params": params}, tokens, cache=cache, **how)
        return result[0][:, 0].astype(jnp.float32), result[1]

    def _prefill(
        self,
        weights: Any,
        tokens: Int[Array, "1 T"],
        length: Int[Array, ""],
        seen: Bool[Array, " V"],
        rows: int,
        slots: int = 0,
        first: Int[Array, ""] | int = 0,
    ) -> State:
        """Reads the tokens from `first` to `length`, once for all `rows`, into a cache of `slots` (0: the context)."""
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        cache = Cache.empty(self.model.config, 1, self.model.dtype, slots)
        positions = jnp.where((index >= first) & (index < length), index, -1)[None]
        logits, cache = self._forward(weights, tokens, cache, positions=positions, logits_at=length - 1)
        state = State(
            layers=unstack_layers((cache.keys, cache.values), self.model.config.num_layers),
            positions=cache.positions,
            length=length,  # the next tokens take the slots of the padding
            logits=logits,
            seen=seen[None],
            step=jnp.zeros((), jnp.int32),
        )
        return jax.tree_util.tree_map(lambda x: jnp.repeat(x, rows, axis=0) if x.ndim else x, state)

    def _decode(
        self, weights: Any, state: State, key: UInt32[Array, " 2"], numbers: Int[Array, " B"], sampling: SamplingParams
    ) -> tuple[State, Int[Array, "T B"], Float[Array, "T B"]]:
        """The next CHUNK tokens of each row and their log-probabilities; `numbers` are those of the samples."""
        ids = jnp.arange(self.model.vocab_size, dtype=jnp.int32)
        fold_in = jax.random.fold_in
        streams = jax.vmap(fold_in, (None, 0))(key, numbers)  # of random numbers, one for each sample

        def step(state: State, _: None) -> tuple[State, tuple[Array, Array]]:
            keys = jax.vmap(fold_in, (0, None))(streams, state.step)
            token = sample_token(jnp.where(self._never_sampled, -jnp.inf, state.logits), state.seen, sampling, keys)
            chosen = jnp.take_along_axis(state.logits, token[:, None], axis=-1)[:, 0]
            logprob = chosen - jax.nn.logsumexp(state.logits, axis=-1)
            seen = state.seen | (ids == token[:, None])
            keys, values = stack_layers(state.layers)
            logits, cache = self._forward(weights, token[:, None], Cache(keys, values, state.positions, state.length))
            layers = unstack_layers((cache.keys, cache.values), len(state.layers))
            state = State(layers, cache.positions, cache.length, logits, seen, state.step + 1)
            return state, (token, logprob)

        state, (tokens, logprobs) = jax.lax.scan(step, state, None, length=CHUNK)
        return state, tokens, logprobs


def _kernels_as(tree: Any, dtype: Any) -> Any:
    """The tree with its matrices in `dtype`; scales of norms stay as they are."""

    def one(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(one, tree)


def unstack_layers(stacked: Any, num_layers: int) -> tuple[Any, ...]:
    """A tree of arrays [L, ...] → one tree for each layer."""
    return tuple(jax.tree_util.tree_map(operator.itemgetter(layer), stacked) for layer in range(num_layers))


def stack_layers(layers: Sequence[Any]) -> Any:
    """The inverse of `unstack_layers`."""
    return jax.tree_util.tree_map(lambda *x: jnp.stack(x), *layers)


@dataclasses.dataclass
class Generation:
    """Samples under way. Iterate, once, to receive their pieces: live for the first that is not finished, in order.

    Attributes:
      prompt: what they follow.
      ids: what the model reads of it, the begin mark included (but not before the end of a longer prompt).
      samples: those finished and passed on.
      seconds: since the start, everything counted.
      prompts: what the model reads before each sample, where they follow prompts of their own.
    """

    sampler: Sampler
    weights: Any = dataclasses.field(repr=False)
    prompt: str
    ids: list[int]
    settings: SampleSettings
    num_samples: int
    seed: int
    samples: list[Sample] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    prompts: Sequence[list[int]] = ()
    _chunks: list[tuple[bool, int, float]] = dataclasses.field(default_factory=list)  # compiled before, tokens, seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all samples while they are decoded; compilation counts only if there was no chunk without it."""
        chunks = [chunk for chunk in self._chunks if chunk[0]] or self._chunks
        return sum(tokens for _, tokens, _ in chunks) / max(1e-9, sum(seconds for *_, seconds in chunks))

    def __iter__(self) -> Iterator[TextDelta]:
        begin = time.perf_counter()
        rows = [_Row(number, self.sampler.tokenizer, self.settings) for number in range(self.num_samples)]
        waiting = iter(rows)
        turn = next(waiting)
        for first in range(0, len(rows), self.sampler.batch_size):
            for _ in self._decode_group(rows[first : first + self.sampler.batch_size]):
                self.seconds = time.perf_counter() - begin
                while turn and (piece := turn.settled()):
                    if piece.sample:
                        self.samples.append(piece.sample)
                        turn = next(waiting, None)
                    yield piece

    def _decode_group(self, group: list["_Row"]) -> Iterator[None]:
        """Adds tokens to the rows until all are finished; yields after each chunk of them."""
        sampler, s, length = self.sampler, self.settings, max(map(len, self.prompts or [self.ids]))
        num_rows = max(sampler.min_rows, min(sampler.batch_size, _power_of_two(len(group))))
        slots = min(sampler.context, max(MIN_SLOTS, _power_of_two(length + s.max_tokens)))
        sampling = SamplingParams(
            temperature=jnp.float32(s.temperature),
            top_k=jnp.int32(min(s.top_k, sampler.model.vocab_size)),
            top_p=jnp.float32(s.top_p),
            min_p=jnp.float32(s.min_p),
            repetition_penalty=jnp.float32(s.repetition_penalty),
        )
        key, numbers = jax.random.PRNGKey(self.seed), np.arange(num_rows, dtype=np.int32) + group[0].number
        state = jax.block_until_ready(self._prefill(group, num_rows, slots, length))
        while live := [row for row in group if not row.finished]:
            begin, before = time.perf_counter(), sum(row.tokens for row in live)
            state, drawn, logprobs = sampler.decode(self.weights, state, key, numbers, sampling)
            drawn, logprobs = np.asarray(drawn), np.asarray(logprobs)
            seconds = time.perf_counter() - begin
            if not np.isfinite(logprobs).all():
                raise ValueError(
                    "params must give finite logits, and do not: the training has diverged; try an earlier --step"
                )
            for row in live:
                column = row.number - group[0].number
                row.write(drawn[:, column].tolist(), logprobs[:, column].tolist())
            self._chunks.append(
                ((num_rows, slots) in sampler.compiled_shapes, sum(row.tokens for row in live) - before, seconds)
            )
            sampler.compiled_shapes.add((num_rows, slots))
            yield

    def _prefill(self, group: list["_Row"], num_rows: int, slots: int, length: int) -> Any:
        """The state after the prompt; after prompts of their own, where all end at `length`, shorter ones begin later.

        Attention sees differences of positions only, so where a prompt begins changes nothing but the rounding.
        """
        sampler = self.sampler
        padded = min(sampler.context, _power_of_two(max(length, 16)))

        def read(ids: list[int], rows: int, **how: Any) -> Any:
            tokens = np.zeros((1, padded), np.int32)
            tokens[0, length - len(ids) : length] = ids
            seen = np.isin(np.arange(sampler.model.vocab_size), ids)
            return sampler.prefill(self.weights, tokens, np.int32(length), seen, rows=rows, slots=slots, **how)

        if not self.prompts:
            return read(self.ids, num_rows)
        each = [self.prompts[row.number] for row in group]
        each += [each[-1]] * (num_rows - len(group))
        states = [read(ids, 1, first=np.int32(length - len(ids))) for ids in each]
        return jax.tree_util.tree_map(lambda *x: jnp.concatenate(x) if x[0].ndim else x[0], *states)


class _Row:
    """The text of one sample: spelled token by token, cut where it ends, and passed on as far as it is settled."""

    def __init__(self, number: int, tokenizer: Tokenizer, settings: SampleSettings):
        self.number, self.tokens, self.logprob, self.finished = number, 0, 0.0, ""
        self._tokenizer, self._settings = tokenizer, settings
        self._spell = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of half a character back
        self._text, self._passed = "", 0

    def write(self, ids: list[int], logprobs: list[float]) -> None:
        """Adds tokens, up to the one that finishes the sample."""
        for token, logprob in zip(ids, logprobs, strict=True):
            self.tokens += 1
            self.logprob += logprob
            ended, known = token == self._tokenizer.eos_id, len(self._text)
            self._text += self._spell.decode(self._tokenizer.token_bytes[token], final=ended)
            found = [self._text.find(stop, max(0, known - len(stop) + 1)) for stop in self._settings.stop]
            if cuts := [cut for cut in found if cut >= 0]:
                self._text, self.finished = self._text[: min(cuts)], "stop"
            elif ended or self.tokens == self._settings.max_tokens:
                self.finished = "eos" if ended else "length"
            if self.finished:
                return

    def settled(self) -> TextDelta | None:
        """What can be passed on since the last call: not a stop text that has only begun. None if there is nothing."""
        end, sample = len(self._text), None
        if self.finished:
            sample = Sample(self._text, self.tokens, self.logprob, self.finished)
        else:
            begun = (stop[:length] for stop in self._settings.stop for length in range(1, len(stop)))
            end -= max((len(start) for start in begun if self._text.endswith(start)), default=0)
        text, self._passed = self._text[self._passed : end], end
        return TextDelta(self.number, text, sample) if text or sample else None


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
