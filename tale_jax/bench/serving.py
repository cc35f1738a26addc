"""How fast a server answers many clients at once, and what is left when they leave.

Each client asks for one text after another, as a stream, for so many seconds. Told are, for each number of clients, the
tokens that all of them got in a second, the time to the first token (median and 99th percentile), and the server's
memory before and after. With --leave as many clients connect and go in the middle of their texts, and the server must
come to rest. It calls a server that runs, here or elsewhere:

    python launch/serve.py --workdir=experiments/tales --max_queue=256
    python -m tale_jax.bench.serving --url=http://127.0.0.1:8000 --clients=1,8,32,128 --seconds=60 --leave=128
"""

import argparse
import asyncio
import dataclasses
import json
import math
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from tale_jax.utils.files import json_line
from tale_jax.utils.streams import printable, say

MEMORY, SAMPLED = "process_resident_memory_bytes", "tale_jax_sampled_tokens_total"
HEAD = (
    "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    "Connection: close\r\n\r\n"
)
REST_SECONDS = 60  # that a server has to come to rest


@dataclasses.dataclass(frozen=True)
class Load:
    """What some clients got. Times in seconds, memory of the server in MB."""

    clients: int
    seconds: float
    texts: int
    tokens_per_second: float
    first_token_median: float
    first_token_p99: float
    refused: int
    memory_before: float
    memory_after: float


@dataclasses.dataclass
class _Client:
    """One server and what its clients ask for."""

    host: str
    port: int
    body: dict[str, Any]
    first_tokens: list[float] = dataclasses.field(default_factory=list)
    texts: int = 0
    refused: int = 0

    @asynccontextmanager
    async def post(self, seed: int) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
        """The status and the body of an answer to a request for a text."""
        body = json.dumps(self.body | {"seed": seed}).encode()
        head = HEAD.format(method="POST", path="/v1/completions", host=self.host, length=len(body))
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(head.encode() + body)
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            yield status, reader
        finally:
            writer.transport.abort()

    async def metrics(self) -> str:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(HEAD.format(method="GET", path="/metrics", host=self.host, length=0).encode())
        text = (await reader.read()).decode()
        writer.close()
        return text

    async def sum_of(self, name: str) -> float:
        """A gauge, over all models."""
        values = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", await self.metrics(), flags=re.MULTILINE)
        return sum(map(float, values))

    async def ask(self, seed: int, end: float) -> None:
        """One text, given up at `end`."""
        start_time, first = time.perf_counter(), True
        async with self.post(seed) as (status, reader):
            if status == 429:
                self.refused += 1
                await asyncio.sleep(0.1)
                return
            if status != 200:
                said = printable((await reader.read()).decode(errors="replace"))
                raise ValueError(f"{self.host}:{self.port} must answer with texts, and answered {status}: {said}")
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if time.perf_counter() > end:
                    return
                self.texts += sum(choice["finish_reason"] is not None for choice in choices)
                if first and choices:
                    self.first_tokens.append(time.perf_counter() - start_time)
                    first = False


async def measure(url: str, clients: int, seconds: float, body: dict[str, Any], seed: int = 0) -> Load:
    """`clients` that ask one after another for `seconds`."""
    client = _client(url, body)
    before, sampled = [await client.sum_of(name) for name in (MEMORY, SAMPLED)]
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        count = 0
        while time.perf_counter() < end:
            await client.ask(seed + number * 10_000 + count, end)
            count += 1

    async def count() -> float:
        await asyncio.sleep(seconds)
        return await client.sum_of(SAMPLED) - sampled

    counted = asyncio.create_task(count())
    await asyncio.gather(*map(one, range(clients)))
    tokens = await counted
    await _rest(client)
    times = sorted(client.first_tokens) or [math.nan]
    median, p99 = np.quantile(times, [0.5, 0.99]).tolist()
    after = await client.sum_of(MEMORY)
    return Load(
        clients, seconds, client.texts, tokens / seconds, median, p99, client.refused, before / 1e6, after / 1e6
    )


async def leave(url: str, clients: int, body: dict[str, Any]) -> float:
    """Seconds until the server is at rest after `clients` have left in the middle of their texts."""
    client = _client(url, body)

    async def one(number: int) -> None:
        async with client.post(number) as (_, reader):
            try:
                async with asyncio.timeout(1 + number % 3):
                    await reader.readline()
            except TimeoutError:
                pass  # it waits in the queue; it leaves as well

    await asyncio.gather(*map(one, range(clients)))
    return await _rest(client)


async def _rest(client: _Client) -> float:
    """Waits until no text is written and none waits. Raises ValueError when that does not happen."""
    start_time = time.perf_counter()
    while time.perf_counter() - start_time < REST_SECONDS:
        used = [await client.sum_of(f"tale_jax_{name}") for name in ("queue_length", "rows_used")]
        if not any(used):
            return time.perf_counter() - start_time
        await asyncio.sleep(0.02)
    raise ValueError(f"the server must come to rest within {REST_SECONDS} s; rows and places are still taken")


def _client(url: str, body: dict[str, Any]) -> _Client:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"url={url} must be the address of a server; give it as http://127.0.0.1:8000")
    return _Client(parts.hostname, parts.port or 80, body | {"stream": True})


def describe(loads: Sequence[Load]) -> str:
    lines = ["clients  tokens/s   texts  first token: median     p99  refused  memory before   after"]
    for load in loads:
        lines.append(
            f"{load.clients:7}  {load.tokens_per_second:8,.0f}  {load.texts:6,}  {load.first_token_median:17,.3f} s"
            f"  {load.first_token_p99:6,.3f} s  {load.refused:7}  {load.memory_before:10,.0f} MB"
            f"  {load.memory_after:,.0f} MB"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server listens")
    parser.add_argument("--clients", default="1,8,32,128", help="numbers of clients, one measurement each")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--max_tokens", type=int, default=200, help="of each text")
    parser.add_argument("--leave", type=int, default=0, help="clients that go in the middle; 0: none")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(argv)
    body = {"prompt": "", "max_tokens": options.max_tokens, "temperature": 0.8}

    async def run() -> tuple[list[Load], float | None]:
        loads = []
        for clients in map(int, options.clients.split(",")):
            loads.append(await measure(options.url, clients, options.seconds, body, seed=len(loads) * 10_000_000))
        return loads, await leave(options.url, options.leave, body) if options.leave else None

    loads, rest = asyncio.run(run())
    if options.json:
        print(json_line({"loads": [dataclasses.asdict(load) for load in loads], "rest_seconds": rest}))
        return
    say(describe(loads))
    if rest is not None:
        say(f"{options.leave} clients left in the middle; the server was at rest {rest:.2f} s later")


if __name__ == "__main__":
    main()
