from fractions import Fraction

import pytest

from saerl_fast.rl.rewards.quantities import clock, in_base, measure, same_clock, same_date, spelled


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        ("5 ft 6 in", ("imperial", 1), 66),
        ("2 hours and 30 minutes", ("time", 1), 9000),
        ("2.5 hours", ("time", 1), 9000),
        ("12 cm^2", ("length", 2), 1200),
        ("3 square m", ("length", 2), 3000000),
        ("1.2 million", ("count", 1), 1200000),
        ("22 degrees 30'", ("angle", 1), 1350),
        ("5 cm and 3 kg", None, 0),
        ("5 apples", None, 0),
        ("x cm", None, 0),
        ("", None, 0),
    ],
)
def test_measure(text, kind, size):
    found = measure(text)
    assert found is None if kind is None else found is not None and found[:2] == (kind, size)


def test_times_of_day():
    assert (
        clock("4:45 p.m.") == (285, True) and clock("16:45") == (285, True) and clock("9 am") == (540, False)
    )
    assert clock("4:45") == (285, None) and clock("45") is None and clock("13 pm") is None
    assert (
        same_clock("16:45", "4:45 PM") and same_clock("4:45", "4:45 PM") and same_clock("9:00 AM", "9 a.m.")
    )
    assert same_clock("4:45 am", "4:45 pm") is False and same_clock("3:4", "3:4") is None


def test_dates():
    assert same_date("4 July", "July 4th") and same_date("March 5, 2020", "5 March 2020")
    assert same_date("March 5, 2020", "March 5") and same_date("March 5, 2020", "March 5, 2021") is False
    assert same_date("June 4", "July 4") is False and same_date("4", "July 4") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("seven", 7),
        ("forty-two", 42),
        ("one hundred and five", 105),
        ("two thousand three hundred", 2300),
        ("minus three", -3),
        ("two thirds", Fraction(2, 3)),
        ("a half", Fraction(1, 2)),
        ("seven apples", None),
        ("and", None),
        ("", None),
    ],
)
def test_numbers_in_words(text, number):
    assert spelled(text) == number


def test_numbers_in_other_bases():
    assert in_base("(1010)_{2}") == in_base("01010_{two}") == in_base("1010 (base 2)") == ("1010", 2)
    assert in_base("2A7_{11}") == ("2A7", 11) and in_base("1010_1") is None and in_base("129_8") is None
    assert in_base("x_2") is None and in_base("1010") is None
