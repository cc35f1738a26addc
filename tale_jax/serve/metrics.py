"""Counters of a server, and how Prometheus reads them (text format 0.0.4)."""

import bisect
import collections
from collections.abc import Iterable

from tale_jax.hardware.machine import resident_memory
from tale_jax.serve.models import Model
from tale_jax.serve.schema import PAGES, SCHEMAS

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
KNOWN = {*SCHEMAS, *PAGES, "/metrics", "/openapi.json", "/"}  # other paths are counted together


class Histogram:
    """Seconds, in buckets."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server has done so far; `open` are the requests under way."""

    def __init__(self):
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.first_token, self.duration = Histogram(), Histogram()
        self.refused = self.disconnected = self.open = 0

    def count(self, path: str, status: int) -> None:
        self.requests[path if path in KNOWN else "other", status] += 1

    def text(self, models: Iterable[Model]) -> str:
        models = list(models)
        lines: list[str] = []

        def add(name: str, kind: str, doc: str, values: Iterable[str]) -> None:
            lines.extend([f"# HELP tale_jax_{name} {doc}", f"# TYPE tale_jax_{name} {kind}", *values])

        def each(name: str, field: str) -> Iterable[str]:
            for model in models:
                label = model.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
                yield f'tale_jax_{name}{{model="{label}"}} {getattr(model.engine, field)}'

        add(
            "requests_total",
            "counter",
            "Requests answered, by path and status.",
            (f'tale_jax_requests_total{{path="{path}",status="{status}"}} {count}'
             for (path, status), count in sorted(self.requests.items())),
        )  # fmt: skip
        add("requests_open", "gauge", "Requests under way.", [f"tale_jax_requests_open {self.open}"])
        add("queue_refused_total", "counter", "Requests refused because the queue was full.",
            [f"tale_jax_queue_refused_total {self.refused}"])  # fmt: skip
        add("disconnects_total", "counter", "Texts given up because their reader had gone.",
            [f"tale_jax_disconnects_total {self.disconnected}"])  # fmt: skip
        for name, kind, doc, field in (
            ("queue_length", "gauge", "Texts that wait.", "waiting"),
            ("rows_used", "gauge", "Texts that are being written.", "running"),
            ("rows", "gauge", "Texts that can be written at a time.", "rows"),
            ("prompt_tokens_total", "counter", "Tokens of prompts read.", "prompt_tokens"),
            ("sampled_tokens_total", "counter", "Tokens written.", "sampled_tokens"),
        ):
            add(name, kind, doc, each(name, field))
        add("first_token_seconds", "histogram", "From the request to its first token.",
            self.first_token.lines("tale_jax_first_token_seconds"))  # fmt: skip
        add("duration_seconds", "histogram", "From the request to its end.",
            self.duration.lines("tale_jax_duration_seconds"))  # fmt: skip
        lines += ["# HELP process_resident_memory_bytes Memory of the process.",
                  "# TYPE process_resident_memory_bytes gauge",
                  f"process_resident_memory_bytes {resident_memory()}"]  # fmt: skip
        return "\n".join(lines) + "\n"
