"""What the server refuses with a line, and the same request as the line says, which is answered."""

import asyncio
import copy
import json
import shutil

import pytest
from helpers import ROOT, served
from starlette.testclient import TestClient

from tale_jax.bench import serving
from tale_jax.inference.sampler import SampleSettings
from tale_jax.serve import inspect as inspect_module
from tale_jax.serve import server as server_module
from tale_jax.serve import settings as settings_module
from tale_jax.serve.engine import Job
from tale_jax.serve.schema import MAX_CHOICES
from tale_jax.serve.server import App, _listen, _read_keys
from tale_jax.serve.settings import ServerSettings

SAID = [{"role": "user", "content": "A fox."}]
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"


def send(client, path, body, status=200):
    """The answer to a request, as JSON; what a refusal says where the status is not 200."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    done = client.post(path, content=content, headers={"content-type": "application/json"})
    assert done.status_code == status, done.text
    if done.headers["content-type"].startswith("text/event-stream"):
        return done.text
    return done.json() if status == 200 else done.json()["error"]["message"]


# The path, what is wrong, what the refusal says, and what it says to send.
BODIES = [
    (TEXTS, b"[]", "must be a JSON object", {}),
    (TEXTS, b'{"seed": NaN}', "must be JSON in UTF-8; it cannot be parsed", b'{"seed": 1}'),
    (TEXTS, b"[" * 100_000, "it is nested too deeply", {}),
    (TEXTS, {"best_of": 2}, "best_of is not supported here; leave it out", {}),
    ("/tokenize", {}, "prompt is missing", {"prompt": "x"}),
    (TEXTS, {"temperature": "hot"}, 'temperature="hot" must be a number', {"temperature": 1}),
    (TEXTS, {"top_p": 0}, "must be above 0, and at most 1", {"top_p": 1}),
    (TEXTS, {"top_k": -1}, "must be at least 0", {"top_k": 0}),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "be one of system, user, assistant", {"messages": SAID}),
    (TEXTS, {"stop": ""}, "must have at least 1 and at most 1000 characters", {"stop": "x"}),
    (TEXTS, {"prompt": "a\ud800"}, "not hold half a surrogate pair", {"prompt": "a"}),
    (TEXTS, {"stop": ["x"] * 17}, "17 items and must have at least 0 and at most 16", {"stop": ["x"] * 16}),
    (TEXTS, {"prompt": 5}, "prompt=5 must be a text or", {"prompt": "5"}),
    (
        TEXTS,
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "must have at most 1024 entries",
        {"logit_bias": {"1": 1}},
    ),
    (TEXTS, {"logit_bias": {"a": 1}}, "must have ids of tokens as keys", {"logit_bias": {"5": 1}}),
    (
        TEXTS,
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x is not supported here; leave it out",
        {"stream_options": {}, "stream": True},
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content is missing", {"messages": SAID}),
    (CHAT, {"messages": [*SAID, {"role": "system", "content": "x"}]}, "system goes first", {"messages": SAID}),
    (
        CHAT,
        {"messages": SAID, "top_logprobs": 2},
        "must be left out without logprobs=true",
        {"messages": SAID, "top_logprobs": 2, "logprobs": True},
    ),
    (
        CHAT,
        {"messages": SAID, "max_tokens": 1, "max_completion_tokens": 1},
        "must be left out where max_completion_tokens is given",
        {"messages": SAID, "max_completion_tokens": 1},
    ),
    (TEXTS, {"stream_options": {}}, "must be left out without stream=true", {}),
    (
        TEXTS,
        {"n": MAX_CHOICES, "prompt": ["a", "b"]},
        "times 2 prompts must be at most",
        {"n": 1, "prompt": ["a", "b"]},
    ),
    (TEXTS, {"prompt": [512]}, "prompt must hold ids below 512", {"prompt": [511]}),
    (TEXTS, {"step": 7}, "step=7 must be one of 10, 20", {"step": 10}),
    (TEXTS, {"ablate": {"heads": [[0, 9]]}}, "must hold [layer, head] below [2, 2]", {"ablate": {"heads": [[0, 1]]}}),
    (TEXTS, {"ablate": {"layers": [2]}}, "ablate.layers must be below 2", {"ablate": {"layers": [1]}}),
    ("/inspect/attention", {"prompt": "x", "layer": 2}, "layer=2 must be below 2", {"prompt": "x", "layer": 1}),
]


@pytest.mark.parametrize(("path", "wrong", "said", "right"), BODIES)
def test_a_request_that_is_corrected_as_told_is_answered(client, path, wrong, said, right):
    assert said in send(client, path, wrong, 400)
    if isinstance(right, dict) and path == TEXTS:
        right = right | {"max_tokens": 2}
    send(client, path, right)


def test_a_text_that_is_shortened_as_told_is_read(client, model, monkeypatch):
    for prompt in ("tale " * 500, "x" * (model.context * model.max_token_bytes + 1), [5] * model.context):
        assert f"must fit the context of {model.context}; shorten it" in send(client, TEXTS, {"prompt": prompt}, 413)
        send(client, TEXTS, {"prompt": prompt[:8], "max_tokens": 1})
    long = {"text": "tale " * (inspect_module.MAX_JUDGED // 5 + 1)}
    assert "must have at most" in send(client, "/inspect/judge", long, 413)
    assert send(client, "/inspect/judge", {"text": "A tale."})["accepted"] is False
    monkeypatch.setattr(inspect_module, "MAX_WEIGHTS", 30)
    assert "ask for one head" in send(client, "/inspect/attention", {"prompt": "a tale of", "layer": 0}, 413)
    send(client, "/inspect/attention", {"prompt": "a", "layer": 0, "head": 1})


def test_a_body_is_sent_as_told(model, monkeypatch):
    app = App([model], max_body_bytes=1000)
    with TestClient(app.asgi) as client:
        refused = client.post(TEXTS, content=b"{}", headers={"content-type": "text/plain"})
        assert refused.status_code == 415 and "send Content-Type: application/json" in refused.text
        parts = (b" " * 600 for _ in range(2))  # of no length that is told before
        refused = client.post(TEXTS, content=parts, headers={"content-type": "application/json"})
        assert refused.status_code == 413 and "must have at most 1000 bytes" in refused.text
        assert "must have at most 1000 bytes" in send(client, TEXTS, b" " * 1001, 413)
        send(client, TEXTS, b'{"max_tokens": 1}')
    monkeypatch.setattr(server_module, "BODY_SECONDS", 0.05)
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send_back(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": TEXTS, "headers": headers, "query_string": b"", "app": None}
    asyncio.run(App([model]).asgi(scope, never, send_back))
    assert sent[0]["status"] == 408 and b"must come within 0.05 seconds" in sent[1]["body"]


def test_a_model_that_is_named_as_told_answers(model, client):
    assert "there is no such model; there is chatty" in send(client, TEXTS, {"model": "x"}, 404)
    other = copy.copy(model)
    other.name = "other"
    with TestClient(App([model, other]).asgi) as two:
        assert "model is missing; there is chatty, other" in send(two, TEXTS, {}, 400)
        assert send(two, TEXTS, {"model": "other", "max_tokens": 1})["model"] == "other"
        refused = two.get("/inspect/model?name=other")
        assert refused.status_code == 400 and "only `model` can be asked for here" in refused.text
        assert two.get("/inspect/model?model=other").json()["model"] == "other"


def test_what_a_workdir_lacks_is_done_without(client, model, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(model, "template", "")
        assert "use /v1/completions" in send(client, CHAT, {"messages": SAID}, 400)
        send(client, TEXTS, {"prompt": "A fox.", "max_tokens": 1})
        without.setattr(type(model), "tells_tales", False)
        assert "was not trained on the embedded tales" in send(client, "/inspect/judge", {"text": "x"}, 400)
        assert not client.get("/inspect/model").json()["judge"]
    send(client, "/inspect/judge", {"text": "x"})


@pytest.mark.parametrize(
    ("template", "said", "status"),
    [
        ("{{ messages[5].content }}", "the chat template cannot be used: ", 400),
        ("{% for i in range(9) %}{{ messages.append(1) }}{% endfor %}", "the chat template cannot be used: ", 400),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot be used: ", 400),
        ("{{ messages.__init__.__globals__ }}", "the chat template cannot be used: ", 400),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template cannot be used: ", 400),
        ("{{ 'x' * 5000000 }}", "it writes more than 4,000,000 characters", 400),
        ("{{ raise_exception('no foxes') }}", "the chat template refuses this conversation: no foxes", 400),
    ],
)
def test_messages_and_a_template_that_suit_each_other(client, model, monkeypatch, template, said, status):
    with monkeypatch.context() as other:
        other.setattr(model, "template", template)
        assert said in send(client, CHAT, {"messages": SAID}, status)
    send(client, CHAT, {"messages": SAID, "max_tokens": 1})


def test_a_full_queue_takes_it_again(client, model):
    limits = SampleSettings(max_tokens=4000)
    jobs = [Job(ids=[1], limits=limits, on_event=lambda _: None, max_tokens=4000) for _ in range(64)]
    model.engine.submit(jobs)
    assert "the queue is full; try again" in send(client, TEXTS, {"n": 64}, 429)
    model.engine.cancel(jobs)
    send(client, TEXTS, {"max_tokens": 1})


def test_a_checkpoint_that_is_damaged_and_another(client, model, tmp_path):
    model._cache.clear()
    folder = model.workdir / "checkpoints" / "10" / "params"
    shutil.move(folder, tmp_path / "params")
    try:
        said = send(client, TEXTS, {"step": 10}, 400)
        assert "step=10 is not a checkpoint that can be read; ask /inspect/checkpoints" in said
        steps = [entry["step"] for entry in client.get("/inspect/checkpoints").json()["checkpoints"]]
        assert steps[-1] != 10
        send(client, TEXTS, {"step": steps[-1], "max_tokens": 1})
    finally:
        shutil.move(tmp_path / "params", folder)
    send(client, TEXTS, {"step": 10, "max_tokens": 1})


def test_a_server_that_ends_and_another(model):
    app = App([model])
    with TestClient(app.asgi) as client:
        app.draining = True
        assert "the server ends; try again later" in send(client, TEXTS, {}, 503)
        app.draining = False
        send(client, TEXTS, {"max_tokens": 1})


# How it is started.


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"port": -1}, {"port": 8000}),
        ({"port": 70_000}, {"port": 8000}),
        ({"rows": 0}, {"rows": 32}),
        ({"block_rows": 40}, {"block_rows": 0}),
        ({"max_queue": 0}, {"max_queue": 256}),
        ({"max_body_bytes": 5}, {"max_body_bytes": 1_000_000}),
        ({"cors_origins": ("a.example",)}, {"cors_origins": ("https://a.example",)}),
        ({"cors_origins": ("http://a.example:80/page",)}, {"cors_origins": ("https://a.example:80",)}),
        ({"cors_origins": ("*", "\x1b[2J")}, {"cors_origins": ("*", "https://example.org")}),
    ],
)
def test_a_setting_that_is_corrected_as_told_serves(wrong, right):
    [name] = wrong
    flag, value = ("cors_origin", right[name][-1]) if name == "cors_origins" else (name, right[name])
    with pytest.raises(ValueError, match=rf"^--{flag}=[^\n\x1b]* must [^\n\x1b]*; try --{flag}={value}$"):
        ServerSettings(**wrong)
    ServerSettings(**right)


def test_a_file_of_keys_that_is_corrected_as_told_is_read(tmp_path):
    file = tmp_path / "keys"
    for content in (b"", b"\n \n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"--api_key_file=.* must hold a key, one a line; write one into it"):
            _read_keys(file)
    for content in ("good\nschlüssel\n".encode(), b"good\n\xff\xfe\n", b"good\ntwo words\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"printable ASCII without spaces, and line 2 is none"):
            _read_keys(file)
    file.write_text("0123456789abcdef\n")
    assert _read_keys(file) == ["0123456789abcdef"]


def test_a_port_that_is_taken_and_one_that_is_free():
    with _listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--host=127.0.0.1 --port={port} must be free .*; try --port=0$"):
            _listen("127.0.0.1", port)
        with _listen("127.0.0.1", 0) as free:
            assert free.getsockname()[1] != port


def test_a_host_that_is_not_this_machine_and_one_that_is():
    for host in ("no.such.host.invalid", "192.0.2.1"):  # no name; an address kept for documents
        with pytest.raises(ValueError, match=rf"^--host={host} must be a name or an .* \(.*\); try --host=127.0.0.1$"):
            _listen(host, 0)
    with _listen("127.0.0.1", 0) as found:
        assert found.getsockname()[0] == "127.0.0.1"


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(settings_module, "has_library", lambda name: name != "uvicorn")
    with pytest.raises(ValueError, match=r"launch/serve.py needs uvicorn, which is not installed; .*serve"):
        ServerSettings()
    assert '\nserve = ["jinja2' in (ROOT / "pyproject.toml").read_text()


def test_a_load_is_asked_for_as_it_is_told(chat_workdir):
    body = {"prompt": "", "max_tokens": 4}
    with served(f"--workdir={chat_workdir}", "--rows=4") as (_, url):
        with pytest.raises(ValueError, match=r"must be the address of a server; give it as http://127.0.0.1:8000"):
            asyncio.run(serving.measure(url.removeprefix("http://"), 1, 0.1, body))
        with pytest.raises(ValueError, match=r"must answer with texts, and answered 400: .*best_of"):
            asyncio.run(serving.measure(url, 1, 0.1, body | {"best_of": 1}))
        assert asyncio.run(serving.measure(url, 1, 0.5, body)).texts
