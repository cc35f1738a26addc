"""A model seen from inside: the forward pass with taps, read out as JSON.

The taps are in the model itself (`TAPS` in `model/transformer.py`): what is shown is computed by the pass that scores
and trains, not by a copy of it. The logit lens (nostalgebraist 2020) applies the final norm and the head after each
block: what the model would say if it ended there. All of it works for each checkpoint and with heads or layers ablated
(`models.py`). Log-probabilities are in nats; what the answers hold is in launch/README.md.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tale_jax.data.tales import grammar
from tale_jax.inference.sampler import power_of_two
from tale_jax.inference.sampling import SamplingParams, filter_logits
from tale_jax.model.layers import rms_norm
from tale_jax.model.loss import Head, logits
from tale_jax.model.transformer import TAPS, Transformer
from tale_jax.runs.records import read_run
from tale_jax.serve.engine import MIN_PREFILL
from tale_jax.serve.models import Model, Variant
from tale_jax.serve.schema import MAX_TOP, Invalid

MAX_WEIGHTS = 1_000_000  # attention weights in one answer
MAX_POINTS = 2000  # of a curve
MAX_JUDGED = 20_000  # characters


class Inspector:
    """The programs that look into one model."""

    def __init__(self, model: Model, never_sampled: np.ndarray):
        self.model = model
        decoder: Transformer = model.model
        self._never_sampled = never_sampled
        self._scores = jax.jit(functools.partial(self._token_scores, decoder))
        self._attention = jax.jit(functools.partial(_attention, decoder), static_argnames="layer")
        self._lens = jax.jit(functools.partial(_lens, decoder))

    def tokens(self, ids: Sequence[int], variant: Variant, top: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """For each position the token that follows, its scores, and the likeliest others; one more for what is next."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        numbers = [settings[name] for name in names]
        numbers[1] = min(numbers[1], self.model.model.vocab_size)
        kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
        bias = np.zeros(self.model.model.vocab_size, np.float32)
        for token, value in settings["logit_bias"].items():
            bias[int(token)] = value
        sampling = SamplingParams(*(k(n) for k, n in zip(kinds, numbers, strict=True)), logit_bias=jnp.asarray(bias))
        greedy = bool(sampling.greedy)
        before, after, likeliest = jax.device_get(self._scores(self.model.params(variant), self._padded(ids), sampling))
        positions = []
        for index in range(len(ids)):
            row = []
            for token in likeliest[index, :top].tolist():
                kept = after[index, token] if not greedy else (0.0 if after[index].argmax() == token else -math.inf)
                row.append(self._token(token) | {"logprob": _nats(before[index, token]), "logprob_after": _nats(kept)})
            entropy = float(-(np.exp(before[index].astype(np.float64)) * before[index]).sum())
            position: dict[str, Any] = {"token": None, "logprob": None, "logprob_after": None}
            if index + 1 < len(ids):
                following = ids[index + 1]
                kept = after[index, following]
                if greedy:
                    kept = 0.0 if after[index].argmax() == following else -math.inf
                position = {
                    "token": self._token(following),
                    "logprob": _nats(before[index, following]),
                    "logprob_after": _nats(kept),
                    "rank": int((before[index] > before[index, following]).sum()),
                }
            positions.append(position | {"entropy": _nats(entropy), "top": row})
        scored = [position["logprob"] for position in positions[:-1]]
        nats = None if None in scored else -sum(scored)
        return {"tokens": [self._token(token) for token in ids], "positions": positions, "nats": nats}

    def attention(self, ids: Sequence[int], variant: Variant, layer: int, head: int | None) -> dict[str, Any]:
        """Weights of a layer: for each head and query a list over the keys up to it, to four decimals."""
        config = self.model.config.model
        for name, value, count in (("layer", layer, config.num_layers), ("head", head or 0, config.num_heads)):
            if value >= count:
                raise Invalid(f"{name}={value} must be below {count}", name)
        heads = range(config.num_heads) if head is None else [head]
        if len(heads) * len(ids) ** 2 // 2 > MAX_WEIGHTS:
            raise Invalid("prompt is too long for all heads at once; ask for one head", "head", 413)
        weights = np.asarray(self._attention(self.model.params(variant), self._padded(ids), layer=layer))
        weights = np.round(weights.astype(np.float64), 4)
        rows = {head: [weights[head, t, : t + 1].tolist() for t in range(len(ids))] for head in heads}
        return {
            "tokens": [self._token(token) for token in ids],
            "layer": layer,
            "heads": [{"head": head, "weights": rows[head]} for head in heads],
        }

    def lens(self, ids: Sequence[int], variant: Variant, top: int) -> dict[str, Any]:
        """For each layer (0: the embedding) and position: the likeliest next tokens, and the one that follows."""
        tokens = self._padded(ids)
        own, values, likeliest, entropy = jax.device_get(self._lens(self.model.params(variant), tokens))
        layers = []
        for layer in range(len(own)):
            positions = []
            for t in range(len(ids)):
                pairs = zip(likeliest[layer, t, :top].tolist(), values[layer, t, :top].tolist(), strict=True)
                positions.append(
                    {
                        "logprob": _nats(own[layer, t]) if t + 1 < len(ids) else None,
                        "entropy": _nats(entropy[layer, t]),
                        "top": [self._token(token) | {"logprob": _nats(value)} for token, value in pairs],
                    }
                )
            layers.append({"layer": layer, "positions": positions})
        return {"tokens": [self._token(token) for token in ids], "layers": layers}

    def about(self) -> dict[str, Any]:
        m, c = self.model, self.model.config.model
        special = {"bos": m.tokenizer.bos_id, "eos": m.tokenizer.eos_id, "pad": m.tokenizer.pad_id}
        return {
            "model": m.name,
            "params": m.num_params,
            "layers": c.num_layers,
            "heads": c.num_heads,
            "kv_heads": c.num_kv_heads,
            "width": c.embed_dim,
            "context": m.context,
            "vocab_size": m.tokenizer.vocab_size,
            "special_tokens": special,
            "corpus": m.config.corpus.name,
            "step": m.default.step,
            "weights": m.weights_kind,
            "chat": bool(m.template),
            "judge": m.tells_tales,
        }

    def checkpoints(self) -> dict[str, Any]:
        """Steps whose weights can be asked for, each with its validation loss where it is known."""
        losses = dict(zip(*self._curve("valid", "nats_per_token"), strict=True))
        steps = [{"step": step, "nats_per_token": losses.get(step)} for step in self.model.steps]
        return {"model": self.model.name, "default": self.model.default.step, "checkpoints": steps}

    def losses(self) -> dict[str, Any]:
        """The loss curve, thinned to at most MAX_POINTS; all in nats per token."""
        curves = {}
        for kind, field in (("train", "loss"), ("valid", "nats_per_token")):
            steps, values = self._curve(kind, field)
            stride = max(1, -(-len(steps) // MAX_POINTS))
            curves[kind] = {"steps": steps[::stride], "nats_per_token": values[::stride]}
        return {"model": self.model.name, **curves, "floor_nats_per_token": self._floor()}

    def judge(self, text: str) -> dict[str, Any]:
        """The grammar's verdict of a tale, and the nats that the grammar itself gives it."""
        if not self.model.tells_tales:
            raise Invalid(f"model={self.model.name} was not trained on the embedded tales, which alone can be judged")
        if len(text) > MAX_JUDGED:
            raise Invalid(f"text has {len(text)} characters and must have at most {MAX_JUDGED}", "text", 413)
        verdict, tokens = grammar.judge(text), len(self.model.tokenizer.encode(text)) + 1
        nats = -verdict.logprob if verdict.accepted else None
        return {
            "accepted": verdict.accepted,
            "kind": verdict.kind,
            "reason": verdict.reason,
            "nats": nats,
            "tokens": tokens,
            "nats_per_token": None if nats is None else nats / tokens,
            "floor_nats_per_token": self._floor(),
        }

    def _curve(self, kind: str, field: str) -> tuple[list[int], list[float | None]]:
        try:
            steps, values = read_run(self.model.workdir).column(kind, field)
        except ValueError:  # a workdir without records, or whose records cannot be read
            return [], []
        return steps, [value if math.isfinite(value) else None for value in values]

    def _floor(self) -> float | None:
        try:
            return read_run(self.model.workdir).latest_start.get("floor_nats_per_token")
        except ValueError:
            return None

    def _padded(self, ids: Sequence[int]) -> Int[Array, "1 T"]:
        padded = min(self.model.context, power_of_two(max(len(ids), MIN_PREFILL)))
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(ids)] = ids
        return jnp.asarray(tokens)

    def _token(self, token: int) -> dict[str, Any]:
        return token_json(self.model, token)

    def _token_scores(
        self, decoder: Transformer, params: Any, tokens: Int[Array, "1 T"], sampling: SamplingParams
    ) -> tuple[Float[Array, "T V"], Float[Array, "T V"], Int[Array, "T K"]]:
        """Log-probabilities before and after penalties, temperature and filters, and the likeliest tokens."""
        x = forward(decoder, params, tokens)[0][0].astype(jnp.float32)
        seen = jnp.cumsum(jax.nn.one_hot(tokens[0], x.shape[-1], dtype=jnp.int32), axis=0) > 0
        after = filter_logits(jnp.where(self._never_sampled, -jnp.inf, x), seen, sampling)
        likeliest = jax.lax.top_k(x, min(MAX_TOP, x.shape[-1]))[1]
        return jax.nn.log_softmax(x, axis=-1), jax.nn.log_softmax(after, axis=-1), likeliest


def forward(decoder: Transformer, params: Any, tokens: Int[Array, "B T"]) -> tuple[Array, dict[str, Any]]:
    """Logits [B, T, V] and the taps of a text: `embedded`, and for `blocks` `residual` and `attention/weights`."""
    # Positions are given so that there is a mask, and so attention weights, on every backend.
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    (result, _), taps = decoder.apply({"params": params}, tokens, positions=positions, mutable=[TAPS])
    return result, dict(taps[TAPS])


def _attention(decoder: Transformer, params: Any, tokens: Int[Array, "1 T"], layer: int) -> Float[Array, "N T T"]:
    return forward(decoder, params, tokens)[1]["blocks"]["attention"]["weights"][0][layer, 0]


def _lens(
    decoder: Transformer, params: Any, tokens: Int[Array, "1 T"]
) -> tuple[Float[Array, "L T"], Float[Array, "L T K"], Int[Array, "L T K"], Float[Array, "L T"]]:
    taps = forward(decoder, params, tokens)[1]
    states = jnp.concatenate([taps["embedded"][0], taps["blocks"]["residual"][0][:, 0]])

    def one(x: Float[Array, "T D"]) -> tuple[Array, Array, Array, Array]:
        logprobs = jax.nn.log_softmax(lens_logits(decoder, params, x[None])[0].astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(logprobs, jnp.roll(tokens[0], -1)[:, None], axis=-1)[:, 0]
        values, likeliest = jax.lax.top_k(logprobs, min(MAX_TOP, logprobs.shape[-1]))
        return own, values, likeliest, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    return jax.lax.map(one, states)


def lens_logits(decoder: Transformer, params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Final norm and head on a state of the residual stream."""
    c = decoder.config
    table = params["embedding"] if c.tie_embeddings else params["head"]
    x = rms_norm(x, params["final_norm"]["scale"], c.norm_eps)
    return logits(x, table, Head(c.tie_embeddings, decoder.materialize_transposes))


def token_json(model: Model, token: int) -> dict[str, Any]:
    """Id, text and bytes of a token; half a character's text is U+FFFD."""
    content = model.tokenizer.token_bytes[token] if token < model.tokenizer.vocab_size else b""
    return {"id": token, "text": content.decode(errors="replace"), "bytes": list(content)}


def _nats(value: Any) -> float | None:
    """A number for JSON, None where it is not finite."""
    return float(value) if math.isfinite(value) else None
