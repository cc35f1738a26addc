"""The server as its users run it: a process, real streams, readers that leave, keys, Ctrl-C; and OpenAI's client."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import time

import httpx2 as httpx
import pytest
from helpers import run_script, served

from tale_jax.utils.subprocesses import run_code

PROMPT = "Once there was"


@pytest.fixture(scope="module")
def server(chat_workdir):
    with served(f"--workdir={chat_workdir}", "--rows=8", "--max_queue=200") as (process, url):
        yield process, url


@pytest.fixture(scope="module")
def url(server):
    return server[1]


def gauge(url, name):
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^tale_jax_{name}(?:\{{.*\}})? (\S+)$", text, flags=re.MULTILINE)[1])


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def long_body(**more):
    return {"prompt": PROMPT, "max_tokens": 4000, "logit_bias": {"2": -100}, "stream": True} | more


def test_a_stream_comes_while_it_is_written(url):
    with httpx.stream("POST", f"{url}/v1/completions", json=long_body()) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["text"] and first["choices"][0]["finish_reason"] is None
        assert gauge(url, "rows_used") == 1
    until(lambda: gauge(url, "rows_used") == 0)


def test_readers_that_leave_free_their_rows_and_places(url):
    async def leave(client, index):
        if index % 2:
            async with client.stream("POST", f"{url}/v1/completions", json=long_body(seed=index)) as answer:
                with contextlib.suppress(httpx.ReadTimeout):
                    await answer.aiter_lines().__anext__()
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post(f"{url}/v1/completions", json=long_body(stream=False), timeout=0.5)

    async def all_leave():
        async with httpx.AsyncClient(timeout=2, limits=httpx.Limits(max_connections=None)) as client:
            await asyncio.gather(*(leave(client, index) for index in range(64)))

    asyncio.run(all_leave())
    until(lambda: gauge(url, "queue_length") == gauge(url, "rows_used") == 0)
    until(lambda: gauge(url, "requests_open") == 1)  # this one
    done = httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}, timeout=30)
    assert done.status_code == 200


def test_a_body_that_does_not_end_or_is_too_large(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    with socket.create_connection((host, int(port))) as chunked:
        chunked.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                chunked.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert b" 413 " in chunked.recv(1000)
    for bad in (b"\0\0\0\0\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET " + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(bad)
            with contextlib.suppress(ConnectionError):
                assert not client.recv(1000).startswith(b"HTTP/1.1 5")
    assert httpx.post(f"{url}/v1/completions", content=b" " * 10_000_000).status_code == 413
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.clients
def test_openai_s_client(url):
    openai = pytest.importorskip("openai", reason="needs the extra clients")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["chatty"]
    wanted = {"model": "chatty", "prompt": PROMPT, "max_tokens": 30, "seed": 1, "logprobs": 3}
    whole = client.completions.create(**wanted)
    assert whole.usage.completion_tokens <= 30 and len(whole.choices[0].logprobs.tokens) <= 30
    parts = [*client.completions.create(**wanted, stream=True, stream_options={"include_usage": True})]
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].usage == whole.usage
    more = client.completions.create(**wanted, extra_body={"top_k": 5, "min_p": 0.1, "token_details": True, "step": 10})
    assert more.choices[0].token_details
    messages = [{"role": "user", "content": "Tell of a fox."}]
    chat = {"model": "chatty", "messages": messages, "max_completion_tokens": 20, "seed": 1}
    said = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    assert said.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    told = [*client.chat.completions.create(**chat, stream=True)]
    assert "".join(p.choices[0].delta.content or "" for p in told) == said.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="best_of is not supported"):
        client.completions.create(**wanted, best_of=2)
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(**wanted | {"model": "x"})

    async def several():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(client.completions.create(**wanted | {"seed": i % 2}) for i in range(6)))
            texts = [answer.choices[0].text for answer in answers]
            assert texts[0::2] == [texts[0]] * 3 and texts[1] == whole.choices[0].text
            stream = await client.chat.completions.create(**chat, stream=True)
            assert "".join([p.choices[0].delta.content or "" async for p in stream]) == said.choices[0].message.content

    asyncio.run(several())


@pytest.mark.slow
def test_the_same_seed_gives_the_text_of_sample_py(url, chat_workdir):
    flags = ["--max_tokens=40", "--seed=3", "--temperature=0.8", "--top_p=0.9", "--json"]
    done = run_script("sample", f"--workdir={chat_workdir}", f"--prompt={PROMPT}", *flags)
    [sample] = json.loads(done.stdout.splitlines()[-1])["samples"]
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 3, "temperature": 0.8, "top_p": 0.9, "logprobs": 0}
    [choice] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert choice["text"] == sample["text"]
    assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(sample["logprob"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_texts_end_and_refuses_new_ones(chat_workdir, number):
    with served(f"--workdir={chat_workdir}", "--rows=4") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=long_body(n=12), timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            process.send_signal(number)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            rest = list(lines)
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        _stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in stderr, stderr


FLOODED = """
import asyncio, os, signal, threading
from tale_jax.serve.server import call_on_signals

async def main():
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    call_on_signals(told.set)

    def flood():
        for _ in range(10_000):  # more than the socket that wakes the loop has room for
            loop.call_soon_threadsafe(lambda: None)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=flood)
    thread.start()
    thread.join()  # meanwhile the loop stands
    await told.wait()
    print("told")

asyncio.run(main())
"""


def test_a_signal_is_not_lost_among_the_events_of_many_texts():
    done = run_code(FLOODED, timeout=60)
    assert done.stdout == "told\n" and "Exception" not in done.stderr, done


@pytest.mark.slow
def test_a_second_signal_ends_at_once(chat_workdir):
    with served(f"--workdir={chat_workdir}") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=long_body(n=30), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in stderr, stderr


@pytest.mark.slow
def test_two_models_and_a_key(chat_workdir, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with served(f"--workdir={chat_workdir}", f"--workdir={chat_workdir}", f"--api_key_file={tmp_path}/key") as (_, url):
        key = {"authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        names = [model["id"] for model in httpx.get(f"{url}/v1/models", headers=key).json()["data"]]
        assert names == ["chatty", "chatty-2"]
        body = {"prompt": PROMPT, "max_tokens": 9, "seed": 1}
        refused = httpx.post(f"{url}/v1/completions", json=body, headers=key)
        assert refused.status_code == 400 and "chatty, chatty-2" in refused.json()["error"]["message"]
        texts = {
            httpx.post(f"{url}/v1/completions", json=body | {"model": name}, headers=key, timeout=60).json()["choices"][
                0
            ]["text"]
            for name in names
        }
        assert len(texts) == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--workdir={tmp}"], "must hold an experiment"),
        (["--workdir={workdir}", "--port=70000"], "port=70000 must be at least 0"),
        (["--workdir={workdir}", "--port={taken}"], "must be free to listen on"),
        (["--workdir={workdir}", "--api_key_file={tmp}/none"], "none must be a file, and does not exist"),
    ],
)
def test_a_mistake_is_one_line(chat_workdir, tmp_path, flags, line):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"tmp": tmp_path, "workdir": chat_workdir, "taken": taken.getsockname()[1]}
        done = run_script("serve", *(flag.format(**places) for flag in flags))
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_load_measurement(url):
    from tale_jax.bench import serving

    body = {"prompt": "", "max_tokens": 20, "temperature": 0.8}
    load = asyncio.run(serving.measure(url, 3, 1.0, body))
    assert load.tokens_per_second > 0 and load.texts > 0 and 0 < load.first_token_median <= load.first_token_p99
    assert "tokens/s" in serving.describe([load])
    asyncio.run(serving.leave(url, 16, body | {"max_tokens": 4000, "logit_bias": {"2": -100}}))
    assert gauge(url, "queue_length") == gauge(url, "rows_used") == 0
