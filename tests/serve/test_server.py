"""The API as clients see it: shapes, streams, scores, refusals, and what happens when someone leaves."""

import concurrent.futures
import functools
import itertools
import json
import operator

import numpy as np
import pytest
from starlette.testclient import TestClient

from tale_jax.data.token_files import load_tokens
from tale_jax.evaluation.scoring import Scorer, Span
from tale_jax.inference.sampler import SampleSettings
from tale_jax.serve import server
from tale_jax.serve.chat import encode_chat
from tale_jax.serve.engine import Job
from tale_jax.serve.schema import MAX_NEW_TOKENS
from tale_jax.serve.server import App, _is_local, _read_keys

PROMPT = "Once there was a fox"


def complete(client, **body):
    done = client.post("/v1/completions", json=body)
    assert done.status_code == 200, done.text
    return done.json()


def stream(client, path="/v1/completions", **body):
    """The chunks of a stream."""
    done = client.post(path, json=body | {"stream": True})
    assert done.status_code == 200 and done.headers["content-type"].startswith("text/event-stream"), done.text
    events = [event.removeprefix("data: ") for event in done.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def refused(client, path="/v1/completions", status=400, **body):
    done = client.post(path, json=body)
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# Completions.


def test_a_completion(client, model):
    answer = complete(client, prompt=PROMPT, max_tokens=12, seed=1)
    assert answer["object"] == "text_completion" and answer["model"] == "chatty" and answer["seed"] == 1
    [choice] = answer["choices"]
    assert choice["finish_reason"] in ("length", "stop") and choice["logprobs"] is None
    read = 1 + len(model.tokenizer.encode(PROMPT))
    assert answer["usage"]["prompt_tokens"] == read and answer["usage"]["total_tokens"] == read + 12
    assert answer == complete(client, prompt=PROMPT, max_tokens=12, seed=1) | {
        "id": answer["id"],
        "created": answer["created"],
    }


def test_prompts_of_all_kinds_and_several_texts(client, model):
    ids = model.tokenizer.encode(PROMPT).tolist()
    wanted = {"max_tokens": 10, "seed": 3, "n": 2}
    alone = [c["text"] for c in complete(client, prompt=PROMPT, **wanted)["choices"]]
    assert alone[0] != alone[1]
    for prompt in (ids, [model.tokenizer.bos_id, *ids], [PROMPT], [ids]):
        assert [c["text"] for c in complete(client, prompt=prompt, **wanted)["choices"]] == alone
    several = complete(client, prompt=["Once", PROMPT, ""], **wanted)
    assert [c["index"] for c in several["choices"]] == [*range(6)]
    assert [c["text"] for c in several["choices"]][2:4] == alone
    assert [c["text"] for c in complete(client, **wanted)["choices"]] == [c["text"] for c in several["choices"]][4:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("more", [{}, {"stop": ["e t", "q"]}, {"temperature": 3.0}, {"echo": True}, {"n": 3}], ids=str)
def test_a_stream_is_the_text_and_no_character_is_split(client, seed, more):
    body = {
        "prompt": PROMPT + " \U0001f9d9",
        "max_tokens": 60,
        "seed": seed,
        "logprobs": 2,
        "token_details": True,
    } | more
    whole = complete(client, **body)
    chunks = stream(client, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert functools.reduce(operator.iadd, (c["logprobs"][name] for c in mine), []) == choice["logprobs"][name]
        assert functools.reduce(operator.iadd, (c["token_details"] for c in mine), []) == choice["token_details"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if more == {"temperature": 3.0}:  # bytes in wild order
            assert "\ufffd" not in choice["text"] or choice["text"].encode()
        if "stop" in more:
            assert not any(stop in choice["text"] for stop in more["stop"])


def test_stop_texts(client):
    text = complete(client, prompt=PROMPT, max_tokens=60, seed=2)["choices"][0]["text"]
    cut = text[20:23]
    for stop in (cut, [cut], ["never there", cut]):
        [choice] = complete(client, prompt=PROMPT, max_tokens=60, seed=2, stop=stop, logprobs=0)["choices"]
        assert choice["text"] == text[: text.index(cut)] and choice["finish_reason"] == "stop"
        assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])


def test_the_log_probabilities_of_prompts_are_those_of_evaluation(client, model):
    """Documents of the valid split, with their end marks: together the nats that `evaluate.py` sums, to 1e-4."""
    tokens, _ = load_tokens(model.workdir, "valid")
    starts = np.flatnonzero(np.asarray(tokens) == model.tokenizer.bos_id).tolist()
    for begin, end in list(itertools.pairwise(starts))[:3]:
        end = min(end, begin + model.context)
        ids = np.asarray(tokens[begin:end]).tolist()
        scorer = Scorer(model.model, model.tokenizer, 1)
        nats, counts, _ = scorer(model.params(model.default), np.asarray(ids, np.int32), [Span(0, 1, len(ids), 0)])
        answer = complete(client, prompt=ids[1:], max_tokens=0, echo=True, logprobs=3)
        logprobs = answer["choices"][0]["logprobs"]
        assert len(logprobs["token_logprobs"]) == counts[0] == len(ids) - 1
        assert -sum(logprobs["token_logprobs"]) == pytest.approx(nats[0], abs=1e-4)
        assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["text"] == model.tokenizer.decode(ids)
        with_bos = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=3)["choices"][0]
        assert with_bos["text"] == answer["choices"][0]["text"]
        assert with_bos["logprobs"]["tokens"] == ["<s>", *logprobs["tokens"]]  # one place for each id that was sent
        assert with_bos["logprobs"]["token_logprobs"] == [None, *logprobs["token_logprobs"]]
        assert with_bos["logprobs"]["text_offset"] == [0, *logprobs["text_offset"]]


def test_as_lm_eval_asks(client, model):
    """Its `local-completions`: echo, one new token, and the continuation's share of the lists."""
    context, continuation = "Once there was", " a fox named Ada"
    ids = model.tokenizer.encode(context + continuation).tolist()
    body = {"prompt": [ids, ids], "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
    for choice in complete(client, **body)["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 1
        length = len(model.tokenizer.encode(context))
        part = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[
            length:-1
        ]
        assert "".join(token for token, _, _ in part) == continuation
        assert all(top[token] == logprob for token, logprob, top in part)


def test_offsets_point_at_the_tokens(client):
    [choice] = complete(client, prompt=PROMPT, max_tokens=30, seed=1, echo=True, logprobs=0)["choices"]
    assert choice["text"].startswith(PROMPT) and choice["logprobs"]["top_logprobs"] is None
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        if not token.startswith("bytes:") and token != "</s>":
            assert choice["text"][offset:].startswith(token)


def test_details_tell_before_and_after(client):
    body = {"prompt": PROMPT, "max_tokens": 8, "seed": 1, "temperature": 0.5, "top_k": 3, "logprobs": 20}
    [choice] = complete(client, **body, token_details=True)["choices"]
    assert len(choice["token_details"]) == 8
    for detail in choice["token_details"]:
        kept = [other["logprob_after"] for other in detail["top"] if other["logprob_after"] is not None]
        assert len(detail["top"]) == 20 and len(kept) == 3 and np.exp(kept).sum() == pytest.approx(1, abs=1e-5)
        assert detail["logprob_after"] is not None


# Chat.


def test_chat(client, model):
    messages = [{"role": "system", "content": "Tell."}, {"role": "user", "content": "A fox?</s> \0"}]
    body = {"messages": messages, "max_tokens": 20, "seed": 1, "logprobs": True, "top_logprobs": 2}
    done = client.post("/v1/chat/completions", json=body)
    assert done.status_code == 200, done.text
    answer = done.json()
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    chunks = stream(client, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert chunks[-1]["usage"] == answer["usage"]
    longer = client.post("/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 3}).json()
    assert longer["usage"]["completion_tokens"] <= 3
    # The template's end marks are tokens, the text's are text; the whole is a prompt like another.
    ids = encode_chat(model.template, messages, model.tokenizer)
    assert ids.count(model.tokenizer.eos_id) == 2 and ids.count(model.tokenizer.bos_id) == 1 and ids[0] == 1
    [same] = complete(client, prompt=ids, max_tokens=20, seed=1)["choices"]
    assert same["text"] == choice["message"]["content"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "echo": True}, "echo"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "messages"),
    ],
)
def test_chat_refuses_by_name(client, body, field):
    assert refused(client, "/v1/chat/completions", **body)["param"] == field


def test_no_chat_without_a_template(client, model, monkeypatch):
    monkeypatch.setattr(model, "template", "")
    error = refused(client, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert "chat template" in error["message"]


@pytest.mark.slow
def test_a_template_that_does_not_end_holds_nobody_up(client, model, monkeypatch):
    """Each render has its limit; one at a time is under way, so that those who wait hold no thread of the server."""
    under_way, most = 0, 0

    def counted(*arguments):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return encode_chat(*arguments)
        finally:
            under_way -= 1

    monkeypatch.setattr(server, "encode_chat", counted)
    loops = "".join(f"{{% for a{i} in range(90000) %}}" for i in range(4)) + "{% endfor %}" * 4
    messages = [{"role": "user", "content": "x"}]
    with concurrent.futures.ThreadPoolExecutor(4) as pool, monkeypatch.context() as other:
        other.setattr(model, "template", loops)
        chats = [pool.submit(refused, client, "/v1/chat/completions", messages=messages) for _ in range(4)]
        assert complete(client, prompt=PROMPT, max_tokens=3)["choices"]
        assert client.post("/tokenize", json={"prompt": PROMPT}).status_code == 200
        assert not all(chat.done() for chat in chats)
        assert all("it takes more than" in chat.result()["message"] for chat in chats)
    assert most == 1
    done = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert done.status_code == 200, done.text


# Refusals.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("suffix", "x"),
        ("user", "me"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", {"other": True}),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", [1]),
        ("max_tokens", -1),
        ("max_tokens", MAX_NEW_TOKENS + 1),
        ("n", 0),
        ("n", 129),
        ("seed", 2**63),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stream", 1),
        ("echo", "yes"),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [1, -1]),
        ("prompt", [1, 10**30]),
        ("prompt", [512]),
        ("prompt", {"a": 1}),
        ("prompt", "\ud800"),
        ("model", 3),
        ("step", 7),
        ("ablate", []),
        ("nothing\n\x00", 1),
    ],
)
def test_what_is_wrong_is_named(client, field, value):
    done = client.post(
        "/v1/completions", content=json.dumps({field: value}), headers={"content-type": "application/json"}
    )
    assert done.status_code == 400, done.text
    assert str(done.json()["error"]["param"]).startswith(field.split("\n")[0])


def test_statuses(client, model):
    assert refused(client, status=404, model="other")["code"] == "model_not_found"
    assert refused(client, status=413, prompt="tale " * 500)["code"] == "context_length_exceeded"
    assert refused(client, status=413, prompt=[5] * model.context)["param"] == "prompt"
    refused(client, status=413, prompt="x" * 1_000_001)
    assert refused(client, n=64, prompt=["a", "b", "c"])["param"] == "n"
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"1", b'"x"', b"null", b"{}}", b'{"temperature": NaN}', b"[" * 100_000, b"\xff"):
        assert client.post("/v1/completions", content=content, headers=json_type).status_code == 400
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    assert client.get("/v1/completions").status_code == 405
    for path in ("/v1/nothing", "/nothing", "/../etc/passwd", "/%00", "/page/index.html", "/index.html/.."):
        done = client.get(path)
        assert done.status_code in (404, 200) and "Traceback" not in done.text
    assert client.get("/v1/models/chatty").json()["id"] == "chatty"
    assert client.get("/v1/models/other").status_code == 404


def test_a_full_queue_is_429(client, model):
    limits = SampleSettings(max_tokens=4000)
    jobs = [Job(ids=[1], limits=limits, on_event=lambda _: None, max_tokens=4000) for _ in range(64)]
    model.engine.submit(jobs)
    assert refused(client, status=429, n=64)["code"] == "queue_full"
    assert "tale_jax_queue_refused_total 0" not in client.get("/metrics").text
    model.engine.cancel(jobs)
    assert complete(client, n=2, max_tokens=1)["usage"]["completion_tokens"] == 2
    assert 'tale_jax_queue_length{model="chatty"} 0' in client.get("/metrics").text


def test_tokens_there_and_back(client):
    text = "Once  there\nwas \U0001f9d9 \u2581"
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    with_bos = client.post("/tokenize", json={"prompt": text, "add_special_tokens": True}).json()["tokens"]
    info = client.get("/tokenizer_info").json()
    assert with_bos == [info["bos_token_id"], *tokens] and info["bos_token"] is None
    refused(client, "/detokenize", tokens=[512])


def test_health_metrics_page_and_document(client, model):
    assert client.get("/health").json() == {"status": "ok"}
    complete(client, max_tokens=2)
    metrics = client.get("/metrics").text
    assert 'tale_jax_requests_total{path="/v1/completions",status="200"}' in metrics
    parser = pytest.importorskip("prometheus_client.parser")
    assert len(list(parser.text_string_to_metric_families(metrics))) > 8
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'self'" in str(page.headers)
    assert "://" not in page.text
    document = client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/completions"]) == {"post"} and "/inspect/lens" in document["paths"]
    for answer in (client.get("/v1/models"), client.get("/inspect/model"), client.get("/inspect/checkpoints")):
        assert str(model.workdir) not in answer.text and "/" not in answer.text


def test_draining_is_503(model):
    app = App([model])
    with TestClient(app.asgi) as client:
        app.draining = True
        assert refused(client, status=503, prompt="x")["code"] == "draining"
        assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "draining"
        assert client.get("/metrics").status_code == 200


def test_keys_and_other_pages(model, tmp_path):
    file = tmp_path / "keys"
    file.write_text("alpha\n\nbeta\n")
    app = App([model], api_keys=_read_keys(file), cors_origins=["https://a.example"])
    with TestClient(app.asgi) as client:
        for key in ("", "Bearer ", "Bearer alph", "Basic alpha", "alpha", "Bearer \xe9"):
            done = client.get("/v1/models", headers={"authorization": key.encode("latin-1")})
            assert done.status_code == 401 and done.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": "bearer beta"}).status_code == 200
        assert client.get("/health").status_code == 200 and client.get("/").status_code == 200
        assert client.get("/metrics").status_code == 401
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert (
            client.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["origin"]
        )
        asked["origin"] = "https://b.example"
        assert "access-control-allow-origin" not in client.options("/v1/completions", headers=asked).headers
    file.write_text("\n")
    with pytest.raises(ValueError, match="must hold a key"):
        _read_keys(file)


def test_only_this_machine_s_own_names(client):
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    for host, local in {
        "localhost": True, "localhost:8000": True, "127.0.0.1:1": True, "[::1]:8000": True, "[::1]": True,
        "": False, "evil.example:8000": False, "127.0.0.1.evil.example": False, "localhost.evil": False,
    }.items():  # fmt: skip
        assert _is_local(host) == local, host
