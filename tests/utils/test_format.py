"""Bytes and seconds, written and read as people do."""

import pytest

from tale_jax.utils.format import format_bytes, format_clock, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 MB"), (512e6, "512 MB"), (999_400_000, "999 MB"), (1e9, "1.00 GB"), (1.5e12, "1,500.00 GB")],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8 * 10**9),
        ("512mb", 512 * 10**6),
        ("1.5GiB", 3 << 29),
        (" 2 k ", 2000),
        (".5T", 5 * 10**11),
        ("7", 7),
        ("7b", 7),
        ("", 0),
    ],
)
def test_bytes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["eight", "8XB", "1.2.3GB", "-1GB"])
def test_text_that_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match=f"^memory={text} must be a number of bytes; try --memory=8GB$"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45, "45 s"), (89, "89 s"), (95, "2 min"), (7140, "119 min"), (8700, "2 h 25 min")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_seconds_are_shown_as_a_clock(seconds, text):
    assert format_clock(seconds) == text
