"""Text from a model: the one sampler behind `launch/sample.py`, the samples along training and the judged tales.

Prefill reads the prompt in one pass and fills the key/value cache. Decoding then runs in compiled chunks of tokens:
each token is sampled on the device (`sampling.py`), and after each chunk the host decodes the new tokens to text, looks
for the end and passes the text on. Lengths of prompts, batches and caches are padded to powers of two, and the sampling
parameters are arguments of the program, so that no prompt, seed or setting makes it compile again. A text may grow
longer than the context: the cache is a ring buffer, and each token attends to the last `seq_len`.

Between the steps, weights and cache are kept as one tree for each layer. The model wants them stacked, and XLA sees
through a stack that is made and sliced in one program; of a stack that comes from outside it copies every layer for
every token, which made decoding three times slower on a CPU. For the same reason weights are converted to the compute
dtype, and a tied embedding is transposed to a head, before the first token: done inside the loop, that was half the
time of a token.

    sampler = Sampler(experiment.model, experiment.params, tokenizer)
    for delta in sampler.stream("Once", SampleSettings(max_tokens=100, temperature=0.7), seed=1):
        print(delta.text, end="", flush=True)
    samples = sampler.sample("", SampleSettings(max_tokens=255), num_samples=200)
"""

import codecs
import dataclasses
import functools
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
from tale_jax.model.adapters import merged
from tale_jax.model.decoding import Cache
from tale_jax.model.transformer import Transformer

CHUNK = 16  # tokens that are decoded before the host sees them
MIN_SLOTS = 64  # of the cache: short texts do not attend to all of a long context, and still share one program
LONG_PROMPT = ("refuse", "window")


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How tokens are sampled, and when a sample ends. Raises ValueError, in one line, for a value out of range.

    Attributes:
      max_tokens: of one sample at most, EOS included.
      temperature: logits are divided by it; 0 is greedy: always the most likely token.
      top_k: only the k most likely tokens, and those that tie with the last of them; 0: all.
      top_p: only the most likely tokens that together reach this probability; 1: all.
      min_p: only tokens whose probability is at least this share of the highest; 0: all.
      repetition_penalty: logits of tokens seen before are divided by it, or multiplied if negative; 1: off.
      stop: texts that end a sample, which is cut before the first of them.
      long_prompt: "refuse" a prompt longer than the context, or "window": keep its last tokens.
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


def check_seed(seed: int) -> None:
    """Raises ValueError, in one line, for a seed that `Sampler.stream` cannot take."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must be at least 0 and below 2^32; try --seed=0")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
      text: what follows the prompt.
      tokens: how many were sampled, EOS or those of the stop text included.
      logprob: of these tokens together, in nats, by the model's own softmax, before penalty, temperature and filters.
      finish_reason: "eos", "stop" (a stop text) or "length" (`max_tokens`).
    """

    text: str
    tokens: int
    logprob: float
    finish_reason: str


class TextDelta(NamedTuple):
    """New text of sample `number`; the last one (perhaps "") brings the whole sample."""

    number: int
    text: str
    sample: Sample | None


class DecodeState(flax.struct.PyTreeNode):
    """What decoding one token of each row needs: a pytree of arrays, or of their shapes."""

    layers: Any  # for each layer, keys and values of the cache, float [B, K, S, H]
    positions: Any  # the rest of the cache: int32 [B, S]
    length: Any  # tokens so far: int32 [], or [B] where rows have lengths of their own
    logits: Any  # of the next token: float32 [B, V]
    seen: Any  # tokens in the prompt and the text so far: bool [B, V]
    step: Any  # tokens sampled: int32 [], or [B]
    counts: Any = None  # of each token in the text so far, where penalties need them: int32 [B, V]


class TopTokens(NamedTuple):
    """The likeliest tokens of a position, the likeliest first, and what they and the chosen token are given.

    Log-probabilities are in nats: `before` by the model's own softmax, `after` by what was sampled from.
    """

    ids: Any  # int32 [..., K]
    before: Any  # float32 [..., K]
    after: Any  # float32 [..., K]
    chosen_after: Any  # float32 [...]


class Sampler:
    """The compiled programs of a model and its tokenizer: make one, and use it for every prompt.

    Args:
      model: the decoder.
      params: its weights; None when each call brings its own.
      tokenizer: encodes the prompt and decodes the text.
      batch_size: samples decoded together at most; more of them come in groups.
      donate: the backend can reuse the memory of the cache (see `hardware/backend.py`).
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        donate: bool = False,
        earlier_step: int = 0,
    ):
        # The same function as the model, in the form that is fastest for a few rows; `_load` prepares its weights.
        config = dataclasses.replace(model.config, scan_layers=False, tie_embeddings=False)
        self.model = model.clone(config=config, materialize_transposes=False, remat="none")
        # XLA on CPU multiplies one row of bfloat16 by converting all weights to float32, for two it has a product.
        self.min_rows = 2 if model.dtype == jnp.bfloat16 else 1
        self.tokenizer, self.batch_size, self.context = tokenizer, batch_size, config.seq_len
        self._earlier_step = earlier_step
        ids, special = np.arange(model.vocab_size), (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id)
        self.never_sampled = (np.isin(ids, special) & (ids != tokenizer.eos_id)) | (ids >= tokenizer.vocab_size)
        self.load = jax.jit(self._load)
        self.prefill = jax.jit(self._prefill, static_argnames=("rows", "slots"))
        donated = (1,) if donate else ()
        self.decode = jax.jit(self._decode, donate_argnums=donated)
        self.decode_with_top = jax.jit(self._decode_with_top, donate_argnums=donated, static_argnames=("chunk", "top"))
        self.compiled_shapes: set[tuple[int, int]] = set()  # numbers of rows and of slots that `decode` has run with
        self._weights = None if params is None else self.load(params)

    def sample(
        self, prompt: str, settings: SampleSettings, *, num_samples: int = 1, seed: int = 0, params: Any = None
    ) -> list[Sample]:
        """Samples that follow the prompt; see `stream`."""
        deltas = self.stream(prompt, settings, num_samples=num_samples, seed=seed, params=params)
        return [delta.sample for delta in deltas if delta.sample]

    def stream_prompts(
        self, prompts: Sequence[str], settings: SampleSettings, *, seed: int = 0, params: Any = None
    ) -> "Generation":
        """One sample for each prompt, decoded together in groups of `batch_size`; otherwise as `stream`."""
        if not prompts:
            raise ValueError("prompts must hold at least one; give [''] to start a document")
        generation = self.stream(prompts[0], settings, num_samples=len(prompts), seed=seed, params=params)
        generation.prompts = [self._encode_prompt(prompt, settings.long_prompt) for prompt in prompts]
        return generation

    def stream(
        self,
        prompt: str,
        settings: SampleSettings,
        *,
        num_samples: int = 1,
        seed: int = 0,
        params: Any = None,
        ids: Sequence[int] = (),
    ) -> "Generation":
        """Samples that follow the prompt, as text deltas: iterate over the result.

        Sample i of a seed is the same whatever `num_samples` is, but for the rounding of products of another shape.

        Args:
          prompt: what the text follows, after BOS; "" is the start of a document.
          settings: how tokens are sampled, and when a sample ends.
          num_samples: how many.
          seed: of the random numbers, below 2^32.
          params: weights to use instead of the sampler's own.
          ids: token ids to read in the place of the prompt's, BOS among them: those of a conversation.

        Raises:
          ValueError: one line, for a prompt of whitespace or longer than the context, or a number out of range; while
            iterating, when logits are not finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1; try --num_samples=1")
        check_seed(seed)
        read = self._fitting(list(ids), settings.long_prompt) if ids else None
        read = read or self._encode_prompt(prompt, settings.long_prompt)
        weights = self._weights if params is None else self.load(params)
        return Generation(self, weights, prompt, read, settings, num_samples, seed)

    def _encode_prompt(self, prompt: str, long_prompt: str) -> list[int]:
        """The token ids that the model reads first."""
        if prompt and not prompt.strip():
            raise ValueError(f"prompt={prompt!r} must hold more than whitespace; leave it out to start a document")
        return self._fitting([self.tokenizer.bos_id, *map(int, self.tokenizer.encode(prompt))], long_prompt)

    def _fitting(self, ids: list[int], long_prompt: str) -> list[int]:
        """Token ids that the context has room for. Raises ValueError, in one line, for more where that is refused."""
        if len(ids) <= self.context:
            return ids
        if long_prompt == "refuse":
            raise ValueError(
                f"prompt of {len(ids) - 1} tokens must fit the context of {self.context}, with BOS before it; "
                "shorten it, or keep only its last tokens: --long_prompt=window"
            )
        return ids[-max(1, self.context * 3 // 4) :]  # the first quarter of new text still sees all of these

    def _load(self, params: Any) -> Any:
        """The weights as decoding needs them: kernels in the compute dtype, one tree a layer, the head a matrix."""
        params = merged(params)
        head = params["head"] if "head" in params else params["embedding"].T
        blocks = unstack_layers(params["blocks"], self.model.config.num_layers)
        return {**params, "head": head.astype(self.model.dtype), "blocks": _cast_kernels(blocks, self.model.dtype)}

    def _forward(
        self, weights: Any, tokens: Int[Array, "B T"], cache: Cache, **options: Any
    ) -> tuple[Float[Array, "B _ V"], Cache]:
        """Logits, in float32, and the cache with the tokens in it."""
        params = {**weights, "blocks": stack_layers(weights["blocks"])}
        result: Any = self.model.apply({"params": params}, tokens, cache=cache, **options)
        return result[0].astype(jnp.float32), result[1]

    def _prefill(
        self,
        weights: Any,
        tokens: Int[Array, "1 T"],
        length: Int[Array, ""],
        seen: Bool[Array, " V"],
        rows: int,
        slots: int = 0,
        first: Int[Array, ""] | int = 0,
    ) -> DecodeState:
        """The state after the tokens from `first` to `length`, repeated `rows` times, with a cache of `slots` positions
        (0: the context)."""
        return self.prefill_with_logits(weights, tokens, length, seen, rows, slots, first)[0]

    def prefill_with_logits(
        self,
        weights: Any,
        tokens: Int[Array, "1 T"],
        length: Int[Array, ""],
        seen: Bool[Array, " V"],
        rows: int,
        slots: int = 0,
        first: Int[Array, ""] | int = 0,
        all_logits: bool = False,
    ) -> tuple[DecodeState, Float[Array, "_ V"]]:
        """The state of `prefill`, and the logits of its last position, or with `all_logits` of all T."""
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        cache = Cache.empty(self.model.config, 1, self.model.dtype, slots)
        positions = jnp.where((index >= first) & (index < length), index, -1)[None]
        at = {} if all_logits else {"logits_at": length - 1}
        logits, cache = self._forward(weights, tokens, cache, positions=positions, **at)
        state = DecodeState(
            layers=unstack_layers((cache.keys, cache.values), self.model.config.num_layers),
            positions=cache.positions,
            length=length,  # the next tokens overwrite the padding
            logits=jax.lax.dynamic_slice_in_dim(logits[0], length - 1, 1) if all_logits else logits[:, 0],
            seen=seen[None],
            step=jnp.zeros((), jnp.int32),
        )
        state = jax.tree_util.tree_map(lambda x: jnp.repeat(x, rows, axis=0) if x.ndim else x, state)
        return state, logits[0]

    def _decode(
        self,
        weights: Any,
        state: DecodeState,
        key: UInt32[Array, "*B 2"],
        numbers: Int[Array, " B"],
        sampling: SamplingParams,
    ) -> tuple[DecodeState, Int[Array, "T B"], Float[Array, "T B"]]:
        """The next CHUNK tokens of each row and their log-probabilities in nats; `numbers` are those of the samples.

        Key and sampling parameters are those of all rows, or of each.
        """
        return self._decode_with_top(weights, state, key, numbers, sampling)[:3]

    def _decode_with_top(
        self,
        weights: Any,
        state: DecodeState,
        key: UInt32[Array, "*B 2"],
        numbers: Int[Array, " B"],
        sampling: SamplingParams,
        wanted: Bool[Array, ""] | None = None,
        chunk: int = CHUNK,
        top: int = 0,
    ) -> tuple[DecodeState, Int[Array, "T B"], Float[Array, "T B"], TopTokens | None]:
        """`_decode` of `chunk` tokens, and the `top` likeliest of each position, computed where `wanted`."""
        ids = jnp.arange(self.model.vocab_size, dtype=jnp.int32)
        fold_in = jax.random.fold_in
        sample_keys = jax.vmap(fold_in, (0 if key.ndim > 1 else None, 0))(key, numbers)

        def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array, TopTokens | None]]:
            token_keys = jax.vmap(fold_in, (0, 0 if state.step.ndim else None))(sample_keys, state.step)
            allowed = jnp.where(self.never_sampled, -jnp.inf, state.logits)
            token, filtered = sample_token(allowed, state.seen, sampling, token_keys, state.counts)
            log_sum = jax.nn.logsumexp(state.logits, axis=-1)
            logprob = _at(state.logits, token) - log_sum
            likeliest = None
            if top and wanted is not None:
                arguments = state.logits, filtered, log_sum, token
                likeliest = jax.lax.cond(
                    wanted, functools.partial(top_tokens, top), functools.partial(_no_tokens, top), *arguments
                )
            is_token = ids == token[:, None]
            keys, values = stack_layers(state.layers)
            logits, cache = self._forward(weights, token[:, None], Cache(keys, values, state.positions, state.length))
            state = DecodeState(
                layers=unstack_layers((cache.keys, cache.values), len(state.layers)),
                positions=cache.positions,
                length=cache.length,
                logits=logits[:, 0],
                seen=state.seen | is_token,
                step=state.step + 1,
                counts=None if state.counts is None else state.counts + is_token,
            )
            return state, (token, logprob, likeliest)

        state, (tokens, logprobs, likeliest) = jax.lax.scan(step, state, None, length=chunk)
        return state, tokens, logprobs, likeliest


def top_tokens(
    top: int, logits: Float[Array, "B V"], filtered: Float[Array, "B V"], log_sum: Float[Array, " B"], token: Array
) -> TopTokens:
    """The `top` likeliest tokens of each row."""
    after = filtered - jax.nn.logsumexp(filtered, axis=-1, keepdims=True)
    values, ids = jax.lax.top_k(logits, top)
    return TopTokens(ids, values - log_sum[:, None], jnp.take_along_axis(after, ids, axis=-1), _at(after, token))


def _no_tokens(top: int, logits: Array, *_: Array) -> TopTokens:
    rows = logits.shape[0]
    zeros = jnp.zeros((rows, top), logits.dtype)
    return TopTokens(jnp.zeros((rows, top), jnp.int32), zeros, zeros, jnp.zeros(rows, logits.dtype))


def _at(x: Float[Array, "B V"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """The value of one id in each row."""
    return jnp.take_along_axis(x, ids[:, None], axis=-1)[:, 0]


def _cast_kernels(tree: Any, dtype: Any) -> Any:
    """The tree with its kernels in `dtype`; scales of norms stay as they are."""

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
    """Samples under way. Iterate, once, to receive their text deltas: of sample 0 as it grows, then of sample 1, ...

    Attributes:
      prompt: what the samples follow.
      ids: what the model reads of it, after BOS (no BOS before the last tokens of a longer prompt).
      samples: those that are finished and passed on.
      seconds: since the start, compilation included.
      prompts: token ids that the model reads before each sample, where each follows a prompt of its own.
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
    _chunks: list["_ChunkTime"] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all samples so far, also of those that are not finished."""
        return sum(chunk.tokens for chunk in self._chunks)

    @property
    def tokens_per_second(self) -> float:
        """`tokens` over `seconds`: reading the prompt and compiling take their time, too."""
        return self.tokens / max(1e-9, self.seconds)

    @property
    def compiled(self) -> bool:
        """Whether a part of `seconds` went into compiling, as the first time for texts of a length."""
        return any(chunk.compiled for chunk in self._chunks)

    @property
    def decoding(self) -> dict[str, float | int]:
        """`tokens seconds tokens_per_second` of decoding alone, in the chunks that did not compile; {} without any."""
        chunks = [chunk for chunk in self._chunks if not chunk.compiled]
        tokens, seconds = sum(chunk.tokens for chunk in chunks), sum(chunk.seconds for chunk in chunks)
        return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds} if seconds else {}

    def __iter__(self) -> Iterator[TextDelta]:
        start_time = time.perf_counter()
        rows = [SampleText(number, self.sampler.tokenizer, self.settings) for number in range(self.num_samples)]
        in_order = iter(rows)
        current = next(in_order)
        for first in range(0, len(rows), self.sampler.batch_size):
            for _ in self._decode_group(rows[first : first + self.sampler.batch_size]):
                self.seconds = time.perf_counter() - start_time
                while current and (delta := current.next_delta()):
                    if delta.sample:
                        self.samples.append(delta.sample)
                        current = next(in_order, None)
                    yield delta

    def _decode_group(self, group: list["SampleText"]) -> Iterator[None]:
        """Adds tokens to the rows until all are finished; yields after each chunk of them."""
        sampler, s, length = self.sampler, self.settings, max(map(len, self.prompts or [self.ids]))
        num_rows = max(sampler.min_rows, min(sampler.batch_size, power_of_two(len(group))))
        slots = min(sampler.context, max(MIN_SLOTS, power_of_two(length + s.max_tokens)))
        sampling = SamplingParams(
            temperature=jnp.float32(s.temperature),
            top_k=jnp.int32(min(s.top_k, sampler.model.vocab_size)),
            top_p=jnp.float32(s.top_p),
            min_p=jnp.float32(s.min_p),
            repetition_penalty=jnp.float32(s.repetition_penalty),
        )
        key, numbers = jax.random.PRNGKey(self.seed), np.arange(num_rows, dtype=np.int32) + group[0].number
        state = jax.block_until_ready(self._prefill(group, num_rows, slots, length))
        while unfinished := [row for row in group if not row.finish_reason]:
            start_time, tokens_before = time.perf_counter(), sum(row.tokens for row in unfinished)
            state, tokens, logprobs = sampler.decode(self.weights, state, key, numbers, sampling)
            tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
            seconds = time.perf_counter() - start_time
            if not np.isfinite(logprobs).all():
                earlier = sampler._earlier_step
                remedy = f"try --step={earlier}" if earlier else "train with a smaller optimizer.learning_rate"
                raise ValueError(f"params must give finite logits, and do not: the training has diverged; {remedy}")
            for row in unfinished:
                column = row.number - group[0].number
                row.add_tokens(tokens[:, column].tolist(), logprobs[:, column].tolist())
            added = sum(row.tokens for row in unfinished) - tokens_before
            self._chunks.append(_ChunkTime((num_rows, slots) not in sampler.compiled_shapes, added, seconds))
            sampler.compiled_shapes.add((num_rows, slots))
            yield

    def _prefill(self, group: list["SampleText"], num_rows: int, slots: int, length: int) -> Any:
        """The state after the prompts. Where each sample has its own, all end at `length`, so shorter ones start later.

        Attention depends on differences of positions only, so where a prompt starts changes nothing but the rounding.
        """
        sampler = self.sampler
        padded = min(sampler.context, power_of_two(max(length, 16)))

        def state_after(ids: list[int], rows: int, **options: Any) -> Any:
            tokens = np.zeros((1, padded), np.int32)
            tokens[0, length - len(ids) : length] = ids
            seen = np.isin(np.arange(sampler.model.vocab_size), ids)
            return sampler.prefill(self.weights, tokens, np.int32(length), seen, rows=rows, slots=slots, **options)

        if not self.prompts:
            return state_after(self.ids, num_rows)
        prompts = [self.prompts[row.number] for row in group]
        prompts += [prompts[-1]] * (num_rows - len(group))
        states = [state_after(ids, 1, first=np.int32(length - len(ids))) for ids in prompts]
        return jax.tree_util.tree_map(lambda *x: jnp.concatenate(x) if x[0].ndim else x[0], *states)


class _ChunkTime(NamedTuple):
    """How long a chunk took, for how many tokens of all rows, and whether its program was compiled in this time."""

    compiled: bool
    tokens: int
    seconds: float


class SampleText:
    """The text of one sample: decoded token by token, cut where it ends, and passed on as soon as it cannot change.

    `text` is all of it so far, of which `num_passed` characters were passed on.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, settings: SampleSettings):
        self.number, self.tokens, self.logprob, self.finish_reason = number, 0, 0.0, ""
        self._tokenizer, self._settings = tokenizer, settings
        self._utf8 = self.decoder()
        self.text, self.num_passed = "", 0

    @staticmethod
    def decoder() -> codecs.IncrementalDecoder:
        """Bytes of tokens -> text; the bytes of half a character are held back."""
        return codecs.getincrementaldecoder("utf-8")("replace")

    def add_tokens(self, ids: list[int], logprobs: list[float]) -> None:
        """Adds tokens, up to the one that finishes the sample."""
        for token, logprob in zip(ids, logprobs, strict=True):
            self.tokens += 1
            self.logprob += logprob
            is_eos, length_before = token == self._tokenizer.eos_id, len(self.text)
            self.text += self._utf8.decode(self._tokenizer.token_bytes[token], final=is_eos)
            stops = [self.text.find(stop, max(0, length_before - len(stop) + 1)) for stop in self._settings.stop]
            if found := [place for place in stops if place >= 0]:
                self.text, self.finish_reason = self.text[: min(found)], "stop"
            elif is_eos or self.tokens == self._settings.max_tokens:
                self.finish_reason = "eos" if is_eos else "length"
            if self.finish_reason:
                return

    def next_delta(self) -> TextDelta | None:
        """The text since the last call, without the beginning of what may become a stop text; None if there is none."""
        end, sample = len(self.text), None
        if self.finish_reason:
            sample = Sample(self.text, self.tokens, self.logprob, self.finish_reason)
        else:
            prefixes = (stop[:length] for stop in self._settings.stop for length in range(1, len(stop)))
            end -= max((len(prefix) for prefix in prefixes if self.text.endswith(prefix)), default=0)
        text, self.num_passed = self.text[self.num_passed : end], end
        return TextDelta(self.number, text, sample) if text or sample else None


def power_of_two(minimum: int) -> int:
    return 1 << (minimum - 1).bit_length()
