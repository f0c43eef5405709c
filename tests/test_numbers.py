from fractions import Fraction

import pytest

from saerl_fast.rl.rewards.numbers import equal, last_number, only_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("it is -3.", -3),
        ("x=-3", -3),
        ("5-3", 3),
        ("3 - 5", 5),
        ("is - 5", -5),
        ("(-5)", -5),
        ("\u22127", -7),
        ("$1,234.50.", 1234.5),
        ("-$5", -5),
        ("1,2", 2),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        ("\\frac{3}{4}", 0.75),
        ("= -\\dfrac{1}{2}", -0.5),
        ("1e3", 1000),
        ("2.5e-3", 0.0025),
        (".5", 0.5),
        ("50%", 50),
        ("#### 18\n", 18),
        ("7 and then none", 7),
        ("57 - 87 = -30", -30),
        ("none", None),
        ("x2", None),
        ("1 1/2", 1.5),
        ("-1 1/2", -1.5),
        ("10 3/2", 1.5),
        ("1\\frac{1}{2}", 1.5),
        ("2 \\dfrac{3}{4}", 2.75),
        ("\\dfrac34", 0.75),
        ("-\\frac{1}{2}", -0.5),
        ("\\frac{-1}{-2}", 0.5),
        ("\\frac1{2}", 0.5),
        ("1.2 \\times 10^3", 1200),
        ("1.2 \\times 10^{-3}", 0.0012),
        ("1.2\u00d710\u00b3", 1200),
        ("1.2 * 10^3", 1200),
        ("1.2 x 10^3", 1200),
        ("10^3", 1000),
        ("2^{10}", 1024),
        ("x^2 is 7", 7),
        ("7 cm^2", 7),
        ("1 000", 1000),
        ("1 234 567", 1234567),
        ("1\u202f000", 1000),
        ("1\u00a0000", 1000),
        ("1\\,000", 1000),
        ("1{,}000", 1000),
        ("\u20135", -5),
        ("\uff0d\uff15", -5),
        ("\uff11\uff12", 12),
        ("\u00bd", 0.5),
        ("3\u00bd", 3.5),
        ("5\u201310", 10),
        ("\u20ac5", 5),
        ("12/0", None),
        ("9" * 5000, None),
    ],
    ids=lambda x: str(x)[:12],
)
def test_last_number(text, value):
    found = last_number(text)
    assert found is None if value is None else found is not None and float(found) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5.50", -5.5),
        ("$5", 5),
        ("\\$18", 18),
        ("5 apples", 5),
        ("5 cm^2", 5),
        ("5\\text{ cm}", 5),
        ("50\\%", 50),
        ("x = 5", 5),
        ("1 1/2", 1.5),
        ("1.2 \\times 10^3", 1200),
        ("1,234", 1234),
        ("1 000", 1000),
        ("20km", 20),
        ("1st", 1),
        ("12:30", None),
        ("2:3", None),
        ("(1,2)", None),
        ("1,2", None),
        ("1, 2", None),
        ("1,22", None),
        ("1.234,56", 1234.56),
        ("3 and 4", None),
        ("between 3 and 4", None),
        ("-5 to 5", None),
        ("3-4", None),
        ("5+3", None),
        ("2024-01-02", None),
        ("1/2/2024", None),
        ("January 5", None),
        ("5 May 2024", None),
        ("3 R 2", None),
        ("2\\sqrt{3}", None),
        ("\\sqrt{3}", None),
        ("3\\pi", None),
        ("5x", None),
        ("x^2", None),
        ("10!", None),
        ("2104_5", None),
        ("|5|", None),
        ("3i", None),
        ("x > 5", None),
        ("seven", None),
        ("", None),
    ],
    ids=str,
)
def test_only_number(text, value):
    found = only_number(text)
    assert found is None if value is None else found is not None and float(found) == value


def test_whole_numbers_are_equal_exactly_and_others_nearly():
    assert equal(Fraction(10**12), Fraction(10**12)) and not equal(Fraction(10**12 + 1), Fraction(10**12))
    assert equal(Fraction("0.333333"), Fraction(1, 3)) and not equal(Fraction("0.3333"), Fraction(1, 3))
    assert not equal(None, Fraction(1)) and not equal(Fraction("0.0000001"), Fraction(0))
