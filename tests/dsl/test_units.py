from __future__ import annotations

import re

import pytest

from llmspec.dsl.parse import parser
from llmspec.dsl.units import UNITS, Dimension, exact_bytes, measure, parse_number


@pytest.mark.parametrize(
    ("digits", "value"),
    [
        ("100_000", 100_000),
        ("4Mi", 4 * 2**20),
        ("4M", 4_000_000),
        ("1.4T", 1_400_000_000_000),
        ("3e-4", 3e-4),
        ("0.1", 0.1),
        ("1e6", 1_000_000),
        ("1.0", 1.0),
    ],
)
def test_numbers(digits, value):
    parsed = parse_number(digits)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("digits", ["1e31", "1e999999999", "9" * 60, "1e-400"])
def test_absurd_numbers_are_refused(digits):
    with pytest.raises(OverflowError):
        parse_number(digits)


def test_bits_are_not_bytes():
    assert measure(400, "Gb/s", "gpu").value == 50_000_000_000
    assert measure(400, "GB/s", None).value == 400_000_000_000
    assert measure(1, "GiB", None).value == 2**30
    assert measure(8, "b", None).value == 1


def test_rates_are_exact():
    assert measure(2.039, "TB/s", None).value == 2_039_000_000_000
    assert measure(5, "us", None).value == 5e-06
    assert measure(30, "days", None) == measure(30 * 24, "hours", None)


def test_the_grammar_reads_exactly_the_units_of_the_table():
    pattern = next(t.pattern for t in parser().terminals if t.name == "UNIT").to_regexp()
    for unit in UNITS:
        assert re.fullmatch(pattern, unit), unit
    for word in ("x", "gpu", "GHz", "B/ss", "tokenss", "KB/s", "kiB", "mb"):
        assert (re.fullmatch(pattern, word) is not None) == (word in UNITS), word


def test_every_dimension_has_units():
    assert {d for d, _ in UNITS.values()} == set(Dimension) - {Dimension.NUMBER}


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 3 * 2**30, 84975927951])
def test_exact_bytes_reads_back(size):
    digits, unit = exact_bytes(size).split()
    assert measure(parse_number(digits), unit, None).value == size


def test_a_quantity_past_all_sense_is_no_number():
    with pytest.raises(OverflowError):
        measure(10**29, "TFLOP/s", None)
