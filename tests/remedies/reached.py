"""Sees which messages of the program each test provokes, so that the table of remedies cannot name a test in vain.

In the process of the tests the interpreter tells when the line of a message is reached (`sys.monitoring`, Python 3.12
and newer; not while hypothesis traces the same lines, so name tests with fixed inputs); of other processes what they
wrote is compared with the templates. A session in which all tests of a table's entry ran, and none of them provoked the
message, fails. `conftest.py` imports the hooks.
"""

import subprocess
import sys
from collections import defaultdict
from types import CodeType
from typing import Any

import pytest
from remedies.messages import ROOT, Message, messages
from remedies.table import named_tests

TOOL_ID = 4  # of sys.monitoring: free for whoever takes it
MAX_SCANNED_CHARS = 200_000
MIN_LITERAL_CHARS = 10  # of a template that is looked for in what another process wrote

_all: list[Message] = messages()
_provoked: set[str] = set()  # by the test that runs: keys of messages
_by_test: dict[str, set[str]] = defaultdict(set)  # in the process that reports, by test without its parameters
_lines: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
for message in _all:
    for line in range(message.first_line, message.last_line + 1):
        _lines[str(ROOT / message.file)][line].append(message.key)


def _literals(message: Message) -> list[str]:
    """What stands between the values of a template; nothing where that is too little to be known again."""
    literals = [part for part in message.template.split("{}") if part]
    return literals if max(map(len, literals), default=0) >= MIN_LITERAL_CHARS else []


_templates = [(message.key, literals) for message in _all if (literals := _literals(message))]


def _holds(line: str, literals: list[str]) -> bool:
    """Whether the literals stand in the line, one after another."""
    place = 0
    for literal in literals:
        found = line.find(literal, place)
        if found < 0:
            return False
        place = found + len(literal)
    return True


def see(text: str) -> None:
    """Takes what a process wrote for provoked by the test that runs."""
    lines = text.splitlines()
    for key, literals in _templates:
        if any("\n" in literal for literal in literals):
            found = _holds(text, literals)
        else:
            found = max(literals, key=len) in text and any(_holds(line, literals) for line in lines)
        if found:
            _provoked.add(key)


def _watch_other_processes() -> None:
    communicate = subprocess.Popen.communicate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = communicate(self, *args, **kwargs)
        for text in written:
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
            if text and len(text) < MAX_SCANNED_CHARS:
                see(text)
        return written

    subprocess.Popen.communicate = watched  # type: ignore[method-assign]


def _watch_this_process() -> None:
    if sys.version_info < (3, 12):
        return
    monitoring = sys.monitoring
    monitoring.use_tool_id(TOOL_ID, "messages")

    def on_start(code: CodeType, _: int) -> Any:
        if code.co_filename in _lines:
            monitoring.set_local_events(TOOL_ID, code, monitoring.events.LINE)
        return monitoring.DISABLE

    def on_line(code: CodeType, line: int) -> Any:
        keys = _lines[code.co_filename].get(line)
        if keys is None:
            return monitoring.DISABLE
        _provoked.update(keys)
        return None

    monitoring.register_callback(TOOL_ID, monitoring.events.PY_START, on_start)
    monitoring.register_callback(TOOL_ID, monitoring.events.LINE, on_line)
    monitoring.set_events(TOOL_ID, monitoring.events.PY_START)


# Hooks of pytest.


def pytest_configure() -> None:
    _watch_other_processes()
    _watch_this_process()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _provoked.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call" and _provoked:
        item.user_properties.append(("provoked", sorted(_provoked)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        seen = _by_test[report.nodeid.partition("[")[0]]
        for name, keys in report.user_properties:
            if name == "provoked":
                seen.update(keys)  # type: ignore[arg-type]


def in_vain() -> list[str]:
    """A line for each message whose tests all ran without provoking it."""
    lines = []
    for message in _all:
        named = named_tests(message)
        ran = named and all(test in _by_test for test in named)
        if ran and not any(message.key in _by_test[test] for test in named):
            lines.append(f"{message.key} {message.template[:70]!r} is not provoked by {', '.join(named)}")
    return lines


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    if hasattr(config, "workerinput") or chosen or sys.version_info < (3, 12):
        return
    if in_vain() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.config.option.keyword or any("::" in argument for argument in terminalreporter.config.args):
        return
    if sys.version_info >= (3, 12) and (lines := in_vain()):
        terminalreporter.section("tests/remedies/table.py names tests in vain")
        for line in lines:
            terminalreporter.line(line)
