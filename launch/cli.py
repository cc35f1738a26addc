"""How every script starts and ends: it parses flags, reports mistakes in one line, and exits with a code.

    from cli import run            # launch/ is the first entry of sys.path for a script in it

    if __name__ == "__main__":
        run(main)                  # main(argv) is called with the flags parsed

Exit codes: 0 done (and `--help`), 2 a user's mistake (ValueError, OSError or a bad flag: one line on stderr, no
traceback), 3 memory ran out (one line, with what to do), 130 interrupted, 141 nobody reads stdout any more
(`| head`). Anything else is a bug and shows its traceback; `--verbosity=1` shows one for mistakes too.
"""

import difflib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # recipes import each other, as `from configs import base`

FLAGS = flags.FLAGS
START_TIME = time.monotonic()


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits; a mistake becomes one line and an exit code."""
    _ask_for_huge_pages()
    try:
        try:
            app.run(main, flags_parser=_parse)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail once more
        sys.exit(141)
    except MemoryError as error:
        _fail(_one_line(error), code=3)
    except (ValueError, OSError) as error:
        if FLAGS.is_parsed() and logging.level_debug():
            traceback.print_exc()
        _fail(_one_line(error))
    sys.exit(0)


def overrides(name: str) -> set[str]:
    """The dotted names of the settings of a config flag that have flags of their own on the command line."""
    return set(config_flags.get_override_values(FLAGS[name]))


def _ask_for_huge_pages() -> None:
    """Starts this script again with huge pages for large arrays, where glibc can: it decides when a process starts.

    Else a training step on a CPU touches hundreds of megabytes in pages of 4 kB, and waits for their addresses.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or not switch.is_file() or "[madvise]" not in switch.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _parse(args: list[str]) -> list[str]:
    """Parses `args` (program name first). Raises ValueError with one clear line for every mistake absl can find."""
    if set(args) & {"-h", "--help", "-help", "-?", "--helpshort"}:
        print(f"{sys.modules['__main__'].__doc__}\nflags:\n{FLAGS.main_module_help()}")
        sys.exit(0)
    FLAGS.set_gnu_getopt(True)  # a stray word must not silently end the flags
    config_names = [name for name in FLAGS if config_flags.is_config_flag(FLAGS[name])]
    for name in config_names:
        _check_config_file(name, args)
    try:
        rest = FLAGS(args)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_explain_unknown(error.flagname, config_names)) from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(_explain_value(str(error), args)) from error
    except config_flags.FlagOrderError:
        raise ValueError(f"give {' and '.join(f'--{n}=FILE' for n in config_names)} before its settings") from None
    except (flags.Error, ValueError) as error:
        raise ValueError(f"{_one_line(error)}; write it as --name=value (see --help)") from None
    except Exception as error:  # a config file may raise anything, and ml_collections raises what a bad path hits
        raise ValueError(_explain_config(config_names, args, error)) from error
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is not a flag: write every argument as --name=value (see --help)")
    # Of jax 0.4.34 beside newer libraries; nothing here needs it, and an error is to be one line.
    logging.get_absl_logger().addFilter(lambda record: "Failed to load jax profiler" not in record.getMessage())
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = logging.WARNING  # what libraries log would break the progress bar
    return rest


def _value_of(name: str, args: list[str]) -> str:
    """The value of `--name=value` or `--name value` in `args`, "" where it is not given."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if re.fullmatch(f"--?{re.escape(name)}", arg):
            return following
        if match := re.match(f"--?{re.escape(name)}=", arg):
            return arg[match.end() :]
    return ""


def _check_config_file(name: str, args: list[str]) -> None:
    path = Path(_value_of(name, args).partition(":")[0])
    if path == Path() or path.is_file():
        return
    folder = path.parent if path.parent.is_dir() else Path("configs")
    recipes = sorted(str(recipe) for recipe in folder.glob("[!_]*.py"))
    raise ValueError(f"--{name}={path}: no such file{_suggestion(str(path), recipes)}")


def _suggestion(word: str, known: list[str]) -> str:
    """`; did you mean X?`, or `; there is X, Y, Z` when no known word is similar."""
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f"; did you mean {close[0]}?"
    return f"; there is {', '.join(known)}" if known else ""


def _explain_unknown(name: str, config_names: list[str]) -> str:
    root = name.removeprefix("no").partition(".")[0]
    if "." in name and root in config_names:
        return f"--{name} changes a setting of --{root}, which is missing: give --{root}=configs/NAME.py before it"
    known = [f"--{flag.name}" for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    return f"--{name} is not a flag of {Path(sys.argv[0]).name}{_suggestion(f'--{name}', known)}"


def _explain_value(message: str, args: list[str]) -> str:
    """One line with a remedy from absl's `flag --name=value: whatever the parser or a validator said`."""
    match = re.match(r"flag --([^=:]+)=(.*?): (.*)", message, flags=re.DOTALL)
    if match is None or match[1] not in FLAGS:
        return " ".join(message.split())
    name, value, reason = match.groups()
    flag = FLAGS[name]
    if "must have a value other than None" in reason:
        return f"--{name} is missing: give --{name}=VALUE ({flag.help})"
    if config_flags.is_config_flag(flag):
        return _explain_config([name], args, ValueError(reason))
    kind, default = flag.flag_type(), flag.default
    if kind == "config_literal" or "ConfigDict" in reason:
        return f"--{name}={value}: {name} is a group of settings; set one of them, as --{name}.NAME={value}"
    if choices := getattr(flag.parser, "enum_values", None):
        return f"--{name}={value} must be one of {', '.join(choices)}{_suggestion(value, list(choices))}"
    if kind == "bool":
        return f"--{name}={value} must be true or false"
    if (rule := flag.parser.syntactic_help) and "value other" not in reason and _parse_fails(flag, value):
        return f"--{name}={value} must be {rule}" + (f"; the default is {default}" if default is not None else "")
    return f"--{name}={value}: {' '.join(reason.split())}"


def _parse_fails(flag: flags.Flag, value: str) -> bool:
    try:
        flag.parser.parse(value)
    except (TypeError, ValueError):
        return True
    return False


def _explain_config(config_names: list[str], args: list[str], error: Exception) -> str:
    """Why a config file could not be loaded, or which of its overrides names no setting."""
    for name in config_names:
        file, colon, variant = _value_of(name, args).partition(":")
        if not file:
            continue
        try:
            config = FLAGS[name].parser.parse(file + colon + variant)
        except Exception as raised:
            cause = raised.__context__ or raised  # ml_collections wraps some, with the traceback as the message
            return f"--{name}={file}{colon}{variant}: {_where(cause, file)}{type(cause).__name__}: {_one_line(cause)}"
        paths = [match[1] for arg in args[1:] if (match := re.match(rf"--?(?:no)?{name}\.([^=]+)", arg))]
        for path in paths:
            if not _is_setting(path, config):
                from tale_jax.config import advice

                return f"--{name}.{path}: there is no such setting; {advice(path, f'--{name}.')}"
    return f"{type(error).__name__}: {_one_line(error)}"


def _where(error: BaseException, file: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)]
    return f"line {lines[-1]}: " if lines else ""


def _is_setting(path: str, config: Any) -> bool:
    """Whether the dotted name is a setting of the config, or a group of them."""
    for part in path.split("."):
        if not hasattr(config, "keys") or part not in config:
            return False
        config = config[part]
    return True
