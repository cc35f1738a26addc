"""Sampled tales judged, and the entropy of held-out ones: the grammar knows the probability of every tale.

`excess_nats_per_token` is nats of the model minus nats of the grammar on the same text, 0 for a perfect model
(`scoring.py` puts it beside the other measures). Sampled tales are judged by the grammar, and searched for in the
training text. Answers to questions about tales are compared with those that the grammar knows.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tale_jax.data.chat_template import ChatTemplate
from tale_jax.data.marks import bos_or_marked, token_ids
from tale_jax.data.tales import grammar
from tale_jax.data.token_files import iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.inference.sampler import Sampler, SampleSettings

MAX_ANSWER_TOKENS = 16


def judge_samples(
    sampler: Sampler,
    workdir: Path,
    num_samples: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Tales sampled from the start of a document, judged: shares of 1.

    `accepted_share`: the grammar generates them, and the world in them stays true. `consistent_share`: of those whose
    sentences are the grammar's, as far as the judge reads, the share whose world stays true. `copied_share`: found word
    for word in the training text. `advance` gets the number of samples that are newly done.
    """
    settings = SampleSettings(max_tokens=sampler.context - 1, temperature=temperature)
    samples = []
    for delta in sampler.stream("", settings, num_samples=num_samples, seed=seed):
        if delta.sample:
            samples.append(delta.sample)
            advance(1)
    verdicts = [grammar.judge(sample.text) for sample in samples]
    tokens, _ = load_tokens(workdir, "train")
    texts = {sample.text for sample in samples}
    copied = {text for text in iter_documents(tokens, sampler.tokenizer) if text in texts}
    accepted = sum(verdict.accepted for verdict in verdicts)
    untrue = sum(verdict.kind == "world" for verdict in verdicts)
    return {
        "sample_temperature": temperature,
        "num_samples": num_samples,
        "accepted_share": accepted / num_samples,
        "consistent_share": accepted / max(1, accepted + untrue),
        "copied_share": sum(sample.text in copied for sample in samples) / num_samples,
    }


def judge_answers(
    sampler: Sampler,
    template: ChatTemplate,
    conversations: Iterable[str],
    num_questions: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """The share of right answers, word for word, to the questions of conversations (documents of `tales_chat`).

    Each is asked with the right answers to those before it. The answers are greedy: the likeliest token each time.
    """
    asked = []
    for document in conversations:
        messages = json.loads(document)["messages"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked += [(template.prompt(messages[:i]), messages[i]["content"]) for i in answers]
        if len(asked) >= num_questions:
            break
    asked = [(ids, answer) for ids, answer in asked[:num_questions] if len(ids) < sampler.context]
    right, settings = 0, SampleSettings(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    if asked:
        generation = sampler.stream("", settings, num_samples=len(asked), ids=asked[0][0])
        generation.prompts = [ids for ids, _ in asked]
        for number, _, sample in generation:
            if sample:
                right += sample.text.strip() == asked[number][1]
                advance(1)
    return {"num_questions": len(asked), "right_share": right / len(asked) if asked else None}


def grammar_nats(
    tokens: np.ndarray,
    starts: np.ndarray,
    wanted: set[int],
    tokenizer: Tokenizer,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[int, float]:
    """Nats of the wanted documents, by number, by the grammar that generated them: no model can expect less."""
    tokens = token_ids(tokens, bos_or_marked(tokens, tokenizer.bos_id))
    ends = [*starts[1:], len(tokens)]
    nats = {}
    for number in wanted:
        text = tokenizer.decode(tokens[starts[number] + 1 : ends[number] - 1].tolist())
        verdict = grammar.judge(text)
        assert verdict.accepted, f"a prepared tale is not accepted ({verdict.reason}): {text}"
        nats[number] = -verdict.logprob
        advance(1)
    return nats
