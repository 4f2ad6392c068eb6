"""Reads while decoding beside the curve: like with like, and a word only when they are far apart."""

from __future__ import annotations

import pytest

from flashsparse.cli.report import drive_parts, start_part
from flashsparse.drive import START_S, drive_rate, start_limit
from flashsparse.flash.curve import DEPTHS, SIZES, Curve
from flashsparse.stats import Counters

CURVE = Curve("", (tuple(1e8 * depth for depth in DEPTHS),) * len(SIZES), None, 5e9)


def cost(rate: float, depth: float = 8, reads: int = 10_000) -> Counters:
    nbytes = reads * 8192
    return Counters(flash_bytes=nbytes, flash_reads=reads, reading_s=nbytes / rate, in_flight_s=depth * nbytes / rate)


@pytest.mark.parametrize("rate,far", [(8e8, False), (4.1e8, False), (3.9e8, True), (15.9e8, False), (16.1e8, True)])
def test_the_curve_is_asked_for_as_many_in_flight(rate: float, far: bool) -> None:
    found = drive_rate(cost(rate, reads=10**6), CURVE, "direct")
    assert found is not None and found.expected == pytest.approx(8e8)
    assert found.rate == pytest.approx(rate) and found.in_flight == pytest.approx(8)
    assert (found.note is not None) == far
    assert drive_parts({"drive": found.to_dict()}) == ([found.note] if far else [])


def test_few_reads_say_nothing() -> None:
    assert drive_rate(cost(1e8, reads=10), CURVE, "direct") is None
    assert drive_rate(Counters(), CURVE, "direct") is None
    assert drive_parts({"drive": None}) == drive_parts({}) == []


def test_without_a_curve_there_is_a_rate_and_no_judgement() -> None:
    for curve, mode in ((None, "direct"), (CURVE, "buffered")):
        found = drive_rate(cost(1e8), curve, mode)
        assert found is not None and found.expected is None and found.note is None


def test_the_first_token_at_the_rate_in_order() -> None:
    limit = start_limit(4_000_000_000, Counters(needed_bytes=1_000_000_000), CURVE)
    assert limit == pytest.approx(1 + START_S)
    assert start_limit(1, Counters(), None) is None
    assert start_part({"start_limit_s": limit, "load_s": 2.5}) == " (and 2.5 s loading; at the drive's rate 3.0 s)"
    assert start_part({"start_limit_s": None, "load_s": 2.5}) == ""
