"""Serves trained models over HTTP: OpenAI's API under /v1, a look inside under /inspect, and a page at /.

    python launch/serve.py --workdir=experiments/tales
    python launch/serve.py --workdir=experiments/tales --workdir=experiments/wikitext2 --port=8080

Ctrl-C lets the texts under way end, and a second one ends at once.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

FLAGS = flags.FLAGS
WORKDIR = define_path("workdir", "folder", "folder of an experiment; may be repeated", required=True, several=True)
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0: other machines may call, too")
flags.DEFINE_integer("port", 8000, "port to listen on; 0: any that is free")
define_path("api_key_file", "file", "file of keys, one a line, one of which each request must bring; left out: none")
CORS = flags.DEFINE_multi_string("cors_origin", [], "other page that may call from a browser, as https://example.org")
flags.DEFINE_integer("max_body_bytes", 1_000_000, "of a request")
flags.DEFINE_integer("rows", 32, "texts that a model writes at a time")
flags.DEFINE_integer("block_rows", 0, "of them decoded in one call; 0: 4 on a CPU, all elsewhere")
flags.DEFINE_integer("max_queue", 256, "texts that wait for a row; beyond, requests are refused")
flags.DEFINE_enum("precision", "float32", ["auto", "float32", "bfloat16", "float16"], "dtype to compute in")
flags.DEFINE_string("weights", "auto", "last, ema, auto (ema where there is one), or mean:K of K checkpoints")


def main(_: list[str]) -> None:
    from tale_jax.serve.settings import ServerSettings

    names = [field.name for field in dataclasses.fields(ServerSettings) if field.name in FLAGS]
    settings = ServerSettings(**{name: FLAGS[name].value for name in names}, cors_origins=tuple(CORS.value))
    from tale_jax.serve.server import serve  # needs the extra

    serve(WORKDIR.value, settings)


if __name__ == "__main__":
    run(main)
