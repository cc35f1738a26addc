"""Human-readable bytes and seconds."""

import re


def format_bytes(count: float | int) -> str:
    """1.50 GB, or 512 MB below 1 GB (1 GB is 10^9 bytes)."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def parse_bytes(text: str) -> int:
    """8GB, 512MB or 1.5GiB → bytes; "" → 0. Raises ValueError, in one line, for other text."""
    if not text:
        return 0
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise ValueError(f"memory={text} must be a number of bytes; try --memory=8GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def format_duration(seconds: float | int) -> str:
    """45 s, 12 min, or 2 h 25 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def format_clock(seconds: float | int) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
