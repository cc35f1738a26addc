"""Samples on a terminal: streamed while they are decoded, as one JSON object, or for one prompt after another.

    prompt_loop(sampler.stream, print_samples, SampleSettings(max_tokens=100), seed=0)

A session at a terminal is as people know it from other prompts: a line is a prompt, `/help` lists the commands, Ctrl-C
stops the text that is being written, and a second one, or Ctrl-D, ends it. Every turn has a seed of its own, which is
said, so that `/seed` can repeat the turn.
"""

import contextlib
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tale_jax.inference.sampler import Generation, SampleSettings
from tale_jax.utils.files import json_line

MAX_SEED = (1 << 32) - 1
COMMAND_WIDTH = 27  # characters


def print_samples(
    generation: Generation,
    as_json: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_text: Callable[[str], Any] = lambda text: None,
    **facts: Any,
) -> None:
    """Prints samples while they are decoded, or, at the end, one JSON object on one line with `facts` in it.

    `should_stop` is asked before each piece of text, and ends it there; `on_text` is told each piece.
    """
    if as_json:
        samples = []
        for delta in generation:
            if should_stop():
                return
            on_text(delta.text)
            samples += [dataclasses.asdict(delta.sample)] if delta.sample else []
        result = {"prompt": generation.prompt, "samples": samples, "seed": generation.seed}
        result |= {"prompt_tokens": len(generation.ids), "tokens": generation.tokens, "seconds": generation.seconds}
        result |= {"tokens_per_second": generation.tokens_per_second, "decoding": generation.decoding}
        print(json_line(result | facts), flush=True)
        return
    starts_sample = True
    for number, text, sample in generation:
        if should_stop():
            print(" [stopped]", flush=True)
            break
        on_text(text)
        title = f"[{number + 1}/{generation.num_samples}] " if generation.num_samples > 1 else ""
        text = _shown(f"{title}{generation.prompt}" * starts_sample + text)
        print(text, end="\n" * (sample is not None), flush=True)
        starts_sample = sample is not None
    if sys.stdout.isatty():
        compiling = ", with compiling" if generation.compiled else ""
        rate = f"{generation.tokens_per_second:,.0f} tokens/s"
        _tell(f"seed {generation.seed}; {generation.tokens:,} tokens in {generation.seconds:.2f} s{compiling}: {rate}")


def prompt_loop(
    stream: Callable[..., Generation],
    show: Callable[..., None],
    settings: SampleSettings,
    seed: int = 0,
    first_prompt: str = "",
    on_new: Callable[[], None] | None = None,
) -> None:
    """Reads prompts and commands from stdin and shows what follows each, until `/quit` or the end of stdin.

    A prompt or a value that cannot be used gets one line on stderr, and the session goes on.

    Args:
      stream: as `Sampler.stream`, called with a prompt, settings and `seed`.
      show: as `print_samples`, called with what `stream` returns and `should_stop`.
      settings: of the first turns; commands change them.
      seed: of the first turn; each turn has the next one.
      first_prompt: of a turn before any that is read; "": none.
      on_new: of a conversation: forgets what was said, as `/new` asks.
    """
    session = _Session(stream, show, settings, seed, on_new)
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  (a bad line ends no session)
    if sys.stdin.isatty():
        what = "how a text begins" if on_new is None else "what you say"
        _tell(f"a line is {what}; /help lists commands, /quit or Ctrl-D ends")
    if first_prompt:
        session.turn(first_prompt)
    interrupted = session.stopped  # the last thing that happened was Ctrl-C
    while not session.ended:
        try:
            line = _read_line()
            interrupted = False
            session.obey(line)
            interrupted = session.stopped
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            if interrupted:
                return
            interrupted = True
            _tell("Ctrl-C once more, /quit or Ctrl-D ends")


class _Session:
    """Settings and seed of the next turn, and the commands that change them."""

    def __init__(
        self,
        stream: Callable[..., Generation],
        show: Callable[..., None],
        settings: SampleSettings,
        seed: int,
        on_new: Callable[[], None] | None,
    ):
        self._on_new = on_new
        self._stream, self._show, self._settings, self._seed = stream, show, settings, seed
        self.ended = False
        self.stopped = False  # whether Ctrl-C ended the text of the last line

    def obey(self, line: str) -> None:
        """A command, or a prompt; a line of white space is neither."""
        self.stopped = False
        if not line.startswith("/"):
            if line.strip():
                self.turn(line)
            return
        if line.startswith("//"):
            self.turn(line[1:])
            return
        name, _, value = line[1:].strip().partition(" ")
        try:
            self._command(name, value.strip())
        except ValueError as error:
            _tell_error(error)

    def turn(self, prompt: str) -> None:
        """Writes what follows the prompt, with the next seed. Ctrl-C ends the text, a second one the session."""
        seed = self._seed
        try:
            if not _is_unicode(prompt):
                raise ValueError("the line must be text in the encoding of the terminal (UTF-8); type it again")
            with _interrupts() as received:
                generation = self._stream(prompt, settings=self._settings, seed=seed)
                self._seed = (seed + 1) & MAX_SEED
                self._show(generation, should_stop=lambda: bool(received))
                self.stopped = bool(received)
        except ValueError as error:
            _tell_error(error)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            self.ended = True
        else:
            if not sys.stdout.isatty():
                _tell(f"seed {seed}")

    def _command(self, name: str, value: str) -> None:
        fields = {field.name: field for field in dataclasses.fields(SampleSettings) if field.name != "stop"}
        if name in ("quit", "exit", "q"):
            self.ended = True
        elif name in ("help", "?", ""):
            for line in self._help(list(fields)):
                print(line)
        elif name == "new" and self._on_new:
            self._on_new()
            _tell("a new conversation")
        elif name == "new":
            self.turn("")
        elif name == "seed":
            self._seed = _read_seed(value) if value else self._seed
            _tell(f"seed {self._seed} for the next turn")
        elif name in fields:
            if value:
                kind = type(getattr(SampleSettings(), name))
                changed = _read_value(kind, name, value, getattr(self._settings, name))
                self._settings = dataclasses.replace(self._settings, **{name: changed})
            _tell(f"{name} {getattr(self._settings, name)}")
        else:
            raise ValueError(f"/{name} is not a command; try /help, or //{name} for a text that begins with /{name}")

    def _help(self, names: list[str]) -> Iterator[str]:
        commands = {
            "TEXT": "the model answers" if self._on_new else "the model goes on from it",
            "//TEXT": "the same, of a text that begins with /",
            "/new": "forgets what was said" if self._on_new else "from the start of a document",
            "/seed N": f"of the next turn, now {self._seed}: repeats a turn",
            **{f"/{name} VALUE": f"now {getattr(self._settings, name)}" for name in names},
            "/quit": "ends; so do Ctrl-D and two Ctrl-C",
            "Ctrl-C": "stops the text",
        }
        for command, meaning in commands.items():
            yield f"{command:<{COMMAND_WIDTH}}{meaning}"


def _read_line() -> str:
    """The next line of stdin. With a terminal it can be edited, and earlier ones recalled."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # stdout gets the texts only
    return input()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that gets the first SIGINT from a terminal; a second one is raised as KeyboardInterrupt.

    So no text ends in the middle of a computation, but where somebody insists.
    """
    received: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (sys.stdin.isatty() and in_main_thread and callable(usual)):
        yield received
        return

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    signal.signal(signal.SIGINT, remember)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, usual)


def _read_seed(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) > MAX_SEED:
        raise ValueError(f"seed={value} must be a whole number below 2^32; try /seed 0")
    return int(value)


def _read_value(kind: type, name: str, value: str, before: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        rule = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name}={value} must be {rule}; it stays {before}, try /{name} {before}") from None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _tell(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _tell_error(error: ValueError) -> None:
    """One line, in which flags are the commands of the same name."""
    message = re.sub(r"--(\w+)=(\S+)", r"/\1 \2", " ".join(str(error).split()))
    print(f"error: {message}", file=sys.stderr, flush=True)


def _shown(text: str) -> str:
    """The text as a terminal may get it: control characters, which would steer it, are written out."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
