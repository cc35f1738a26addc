"""Flags, mistakes and exit codes of every script: it parses the flags, reports mistakes in one line, and exits.

Exit codes: 0 done (and `--help`), 2 a user's mistake (ValueError, OSError or a bad flag: one line on stderr, no
traceback), 3 memory ran out (one line, with what to do), 130 interrupted, 141 nobody reads stdout any more
(`| head`). Anything else is a bug and shows its traceback; `--verbosity=1` shows one for mistakes too.
"""

import contextlib
import difflib
import logging as logging_of_python
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from tale_jax.utils.paths import expanded, fault_of, printable_path
from tale_jax.utils.progress import show_start
from tale_jax.utils.signals import before_exit
from tale_jax.utils.streams import mend_streams, printable, say, write_line

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[1]
SAVED_CONFIG = ROOT / "tale_jax" / "runs" / "saved_config.py"
OURS = ("tale_jax", "configs", "launch")  # a module of ours that is missing is a bug, any other an environment

flags.disclaim_key_flags()  # what `define_path` defines belongs to the script that calls it


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits; a mistake becomes one line and an exit code."""
    try:
        _run(main)
    except SystemExit as end:
        _call_before_exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException:
        if before_exit:
            traceback.print_exc()
        _call_before_exit(1)
        raise


def _call_before_exit(code: int) -> None:
    for call in before_exit:
        call(code)


def _run(main: Callable[[list[str]], Any]) -> NoReturn:
    _ask_for_huge_pages()
    mend_streams()
    start = show_start(f"{Path(sys.argv[0]).stem}: starting")
    try:
        try:
            _check_current_folder()
            app.run(main, flags_parser=_parse)
        finally:
            start.__exit__(None)
            sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except BrokenPipeError:
        _drop_results()
        sys.exit(141)
    except MemoryError as error:
        _fail(_one_line(error), code=3)
    except (ValueError, OSError) as error:
        _show_traceback_if_wanted()
        _fail(_one_line(error))
    except FloatingPointError as error:  # raised by JAX where the user asked for it
        _show_traceback_if_wanted()
        _fail(f"JAX_DEBUG_NANS or JAX_DEBUG_INFS: {_one_line(error)}; unset it to go on")
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("", *OURS):
            raise
        _show_traceback_if_wanted()
        _fail(
            f"this Python ({sys.executable}) cannot import {error.name} ({_one_line(error)}); run `make env` in {ROOT}"
        )
    sys.exit(0)


def overrides(name: str) -> set[str]:
    """The dotted names of the settings of a config flag that have flags of their own on the command line."""
    return set(config_flags.get_override_values(FLAGS[name]))


def use_saved_config(args: list[str]) -> None:
    """Adds the config that the workdir was trained with, where the arguments name none."""
    workdir = re.search(r"\0--?workdir[=\0]([^\0]+)", "\0".join(["", *args[1:]]))
    if workdir is None or any(re.match(r"--?config(=|$)", arg) for arg in args):
        return
    folder = os.path.expanduser(workdir[1])
    if os.path.isfile(os.path.join(folder, "config.json")):
        recipe = str(SAVED_CONFIG) if ":" not in str(SAVED_CONFIG) else os.path.relpath(SAVED_CONFIG)
        args.insert(1, f"--config={recipe}:{folder}")  # its settings must stand behind it


def define_path(
    name: str, kind: str, help: str, *, default: str | None = None, required: bool = False, several: bool = False
) -> flags.FlagHolder:
    """A flag whose value is a `Path` (None where it is left out; a list of them for `several`).

    `~` is expanded; what cannot be used as a path of this `kind` (see `utils/paths.py`) is refused before `main`.
    """
    parser, define = PathParser(name, kind), flags.DEFINE_multi if several else flags.DEFINE
    given: dict[str, Any] = {"name": name, "default": default, "help": help, "required": required}
    return define(parser=parser, serializer=flags.ArgumentSerializer(), **given)


class PathParser(flags.ArgumentParser):
    """Reads the path of a flag; `check` says whether it can be used, when all flags are known."""

    def __init__(self, name: str, kind: str):
        self.name, self.kind, self.syntactic_help = name, kind, f"the path of a {kind}"

    def parse(self, argument: str | Path) -> Path:
        if isinstance(argument, Path):
            return argument
        path = expanded(argument, f"--{self.name}")
        if argument.endswith("/") and self.kind.startswith("file"):
            raise ValueError(f"--{self.name}={printable_path(argument)} must be a file, and / at its end says folder")
        return path

    def flag_type(self) -> str:
        return "path"

    def check(self, value: Path | list[Path] | None) -> None:
        for path in value if isinstance(value, list) else [value] if value is not None else []:
            if fault := fault_of(path, self.kind):
                raise ValueError(f"--{self.name}={printable_path(path)} {fault}")


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise ValueError("the current folder is gone; go to one that exists, with cd, and try again") from None


def _show_traceback_if_wanted() -> None:
    if FLAGS.is_parsed() and logging.level_debug():
        traceback.print_exc()


def _drop_results() -> None:
    """Sends what is still to be written to stdout nowhere: the flush at exit must not fail once more."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _ask_for_huge_pages() -> None:
    """Starts this script again with huge pages for large arrays, where glibc can: it decides when a process starts.

    Else a training step on a CPU touches hundreds of megabytes in pages of 4 kB, and waits for their addresses.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    with contextlib.suppress(OSError):  # it is faster, no more
        if "GLIBC_TUNABLES" in os.environ or not switch.is_file() or "[madvise]" not in switch.read_text():
            return
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(message: str, code: int = 2) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_results()
    write_line(f"error: {printable(message)}")
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{printable_path(os.fsdecode(error.filename))}: {error.strerror}"
    return " ".join(str(error).split()) + _jax_variables(error) or type(error).__name__


def _jax_variables(error: BaseException) -> str:
    """Where JAX refuses a value of its configuration: which variables of the environment may have set it."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not files or Path(files[-1]).parts[-3:] != ("jax", "_src", "config.py"):
        return ""
    from tale_jax.hardware.environment import variables_of_jax

    return f"; correct or unset what is set in the environment: {variables_of_jax()}"


def _parse(args: list[str]) -> list[str]:
    """Parses `args` (program name first). Raises ValueError with one clear line for every mistake absl can find."""
    if set(args) & {"-h", "--help", "-help", "-?", "--helpshort"}:
        say(f"{sys.modules['__main__'].__doc__}\nflags:\n{FLAGS.main_module_help()}")
        sys.exit(0)
    FLAGS.set_gnu_getopt(True)  # a stray word must not silently end the flags
    config_names = [name for name in FLAGS if config_flags.is_config_flag(FLAGS[name])]
    for name in config_names:
        args = _with_config_file(name, args)
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
    for name in FLAGS:
        if isinstance(parser := FLAGS[name].parser, PathParser):
            parser.check(FLAGS[name].value)
    # Of jax 0.4.34 beside newer libraries; nothing here needs it, and an error is to be one line.
    logging.get_absl_logger().addFilter(lambda record: "Failed to load jax profiler" not in record.getMessage())
    if FLAGS["verbosity"].using_default_value:
        logging_of_python.getLogger("matplotlib").setLevel("ERROR")  # it warns where it cannot keep its cache
        FLAGS.verbosity = logging.WARNING  # what libraries log would break the progress bar
    return rest


def _value_of(name: str, args: list[str]) -> str | None:
    """The value of `--name=value` or `--name value` in `args`, None where it is not given."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if re.fullmatch(f"--?{re.escape(name)}", arg):
            return following
        if match := re.match(f"--?{re.escape(name)}=", arg):
            return arg[match.end() :]
    return None


def _with_config_file(name: str, args: list[str]) -> list[str]:
    """`args` with the path of a config file that exists: `~` is expanded, and recipes are found from any folder."""
    value = _value_of(name, args)
    if value is None:
        return args
    file, colon, variant = value.partition(":")
    path = expanded(file, f"--{name}")
    if not path.is_absolute() and not os.path.lexists(path) and os.path.isfile(ROOT / path):
        path = ROOT / path
    if not os.path.lexists(path):
        folder = path.parent if os.path.isdir(path.parent) else ROOT / "configs"
        recipes = sorted(str(recipe).removeprefix(f"{ROOT}/") for recipe in folder.glob("[!_]*.py"))
        raise ValueError(f"--{name}={printable_path(file)}: no such file{_suggestion(str(file), recipes)}")
    if fault := fault_of(path, "file"):
        raise ValueError(f"--{name}={printable_path(file)} {fault}, as configs/tales.py")
    if path == Path(file):
        return args
    changed = []
    for arg in args:
        is_value = arg == value and changed and re.fullmatch(f"--?{re.escape(name)}", changed[-1])
        if is_value or re.match(f"--?{re.escape(name)}=", arg):
            arg = arg[: len(arg) - len(value)] + f"{path}{colon}{variant}"
        changed.append(arg)
    return changed


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
    script = Path(sys.argv[0]).name
    if config_names and not difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.8):
        from tale_jax.config import setting_meant_by

        if setting := setting_meant_by(name):
            return f"--{name} is not a flag of {script}; did you mean --{config_names[0]}.{setting}?"
    return f"--{name} is not a flag of {script}{_suggestion(f'--{name}', known)}"


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
    if isinstance(flag.parser, PathParser):
        return reason[reason.index(f"--{name}=") :] if f"--{name}=" in reason else reason
    kind, default = flag.flag_type(), flag.default
    if kind == "config_literal" or "ConfigDict" in reason:
        return f"--{name}={value}: {name} is a group of settings; set one of them, as --{name}.NAME={value}"
    if choices := getattr(flag.parser, "enum_values", None):
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]}?" if near else f"try --{name}={choices[0]}"
        return f"--{name}={value} must be one of {', '.join(choices)}; {remedy}"
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
        file, colon, variant = (_value_of(name, args) or "").partition(":")
        if not file:
            continue
        try:
            config = FLAGS[name].parser.parse(file + colon + variant)
        except Exception as raised:
            cause = raised.__context__ or raised  # ml_collections wraps some, with the traceback as the message
            if isinstance(cause, ValueError) and str(cause).startswith(f"{file}:"):  # what a recipe says of itself
                return f"--{name}={_one_line(cause)}"
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
