"""How a server runs: what `launch/serve.py` is told, checked before anything is opened."""

import dataclasses
import re
from pathlib import Path

from tale_jax.utils.extras import has_library, missing_extra
from tale_jax.utils.paths import printable_path

LIBRARIES = ("starlette", "uvicorn", "jinja2")  # of the extra `serve`
ORIGIN = r"https?://(?:[\w-]+\.)*[\w-]+(?::\d{1,5})?|https?://\[[\da-fA-F:.]+\](?::\d{1,5})?"


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Attributes:
      host, port: where it listens; port 0 takes any that is free.
      api_key_file: a file of keys, one a line, one of which each request must bring; None: none are needed.
      cors_origins: other pages that may call the server from a browser; ("*",): all.
      max_body_bytes: of a request.
      rows, block_rows, max_queue: of each model's engine.
      precision, weights: as in `launch/sample.py`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 1_000_000
    rows: int = 32
    block_rows: int = 0
    max_queue: int = 256
    precision: str = "float32"
    weights: str = "auto"

    def __post_init__(self):
        self._check_origins()
        for name, holds, rule, example in (
            ("port", 0 <= self.port < 1 << 16, "be at least 0 (any that is free) and below 65536", "8000"),
            ("max_body_bytes", self.max_body_bytes >= 1000, "be at least 1000", "1000000"),
            ("rows", 1 <= self.rows <= 1024, "be at least 1 and at most 1024", "32"),
            ("block_rows", 0 <= self.block_rows <= self.rows, f"be at least 0 and at most rows={self.rows}", "0"),
            ("max_queue", self.max_queue >= 1, "be at least 1", "256"),
        ):
            if not holds:
                raise ValueError(f"--{name}={getattr(self, name)} must {rule}; try --{name}={example}")
        for library in LIBRARIES:
            if not has_library(library):
                raise ValueError(missing_extra("launch/serve.py", library, "serve"))

    def _check_origins(self) -> None:
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(ORIGIN, origin):
                right = re.sub(r"^(?:\w+:)?/*([^/?#]*).*$", r"https://\1", origin, flags=re.DOTALL)
                right = right if re.fullmatch(ORIGIN, right) else "https://example.org"
                raise ValueError(
                    f"--cors_origin={printable_path(origin)} must be as a browser sends it, scheme and host; "
                    f"try --cors_origin={right}"
                )
