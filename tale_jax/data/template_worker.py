"""A process that renders Jinja templates which came with a model: nobody knows what they do.

    python -m tale_jax.data.template_worker     a request a line on stdin, a result a line on stdout, both JSON

Jinja's sandbox refuses what reaches beyond the template; the limits of this process end what takes all time or memory.
It imports nothing but Jinja, so that it starts fast and holds little.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_SECONDS = 2  # of computing, for the texts of one conversation
MAX_CHARS = 4_000_000  # of one text
MAX_BYTES = 1 << 30  # of this process


class Refused(Exception):
    """What a template raises with `raise_exception`."""


class Limit(BaseException):
    """A limit that was reached; no template can catch it."""


def renderer(template: str, special: dict[str, str]) -> Callable[..., str]:
    """A function (messages, tools, add_generation_prompt) → text, with what Hugging Face gives its templates.

    `special` are bos_token, eos_token and the like. Raises jinja2.TemplateError for what is no template.
    """
    import jinja2.sandbox

    def refuse(message: Any) -> None:
        raise Refused(str(message))

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = to_json
    compiled = environment.from_string(template)

    def render(messages: list[Any], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        parts, size = [], 0
        for part in compiled.generate(**values, **special):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise Limit(f"it writes more than {MAX_CHARS:,} characters")
        text = "".join(parts)
        text.encode()  # half a surrogate pair is no text
        return text

    return render


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request: `texts`, or `refused` or `error` with the reason."""
    try:
        render = renderer(request["template"], request["special"])
        return {"texts": [render(*arguments) for arguments in request["renders"]]}
    except Refused as error:
        return {"refused": _one_line(error, 300)}
    except Limit as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"it takes more than {MAX_BYTES >> 20} MB of memory"}
    except Exception as error:  # whatever the code of a template raises
        return {"error": f"{type(error).__name__}: {_one_line(error, 200)}"}


def _one_line(error: Exception, max_chars: int) -> str:
    """What an error says, by the words of a template perhaps: of one line, and harmless on a terminal."""
    words = " ".join(str(error)[: 10 * max_chars].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in words)[:max_chars]


def limited(request: dict[str, Any]) -> dict[str, Any]:
    """`answer`, ended where it computes for longer than `MAX_SECONDS`. In the main thread only."""

    def stop(*_: Any) -> None:
        raise Limit(f"it takes more than {MAX_SECONDS} s")

    usual = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, MAX_SECONDS)
    try:
        return answer(request)
    except Limit as error:
        return {"error": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)


def main() -> None:
    """Serves requests until stdin ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere; time is limited all the same
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    for line in sys.stdin:
        with contextlib.suppress(ImportError, ValueError, OSError):
            # No signal is handled within one operation, such as 3 ** (10 ** 9): the kernel ends the process then.
            import resource

            end = int(time.process_time()) + MAX_SECONDS + 2
            resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(json.dumps(limited(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
