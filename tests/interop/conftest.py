"""What the comparisons measure is printed as tables at the end."""

from typing import Any

import pytest

ROWS: dict[str, list[dict[str, Any]]] = {}


@pytest.fixture
def table():
    """table("logits", model=…, max=…): one more row of the table of that name."""

    def add(name: str, **row: Any) -> None:
        ROWS.setdefault(name, []).append(row)

    return add


def pytest_terminal_summary(terminalreporter):
    for name, rows in ROWS.items():
        terminalreporter.section(name)
        for row in rows:
            cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            terminalreporter.write_line(" | ".join(cells))
