"""Numbers as people write them: a table of texts with reasons, and properties of the reader."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from var.rewards.numbers import find_last_number, read_number

# (text, its number or None, reason)
TABLE = [
    # thousands
    ("It costs 1,234 dollars", "1234", "a comma before exactly three digits groups"),
    ("1,234,567.89", "1234567.89", "several groups, with decimals"),
    ("12, ", "12", "a comma before a space is punctuation"),
    ("1,234, as computed", "1234", "the second comma is punctuation"),
    ("2,3,5", None, "a list: no comma is before three digits"),
    ("0,5", None, "a decimal comma, or a list: 0 does not begin a group"),
    ("1234,567", None, "four digits do not begin a group"),
    ("12,34,567", None, "a group of two digits: an Indian number, or a list"),
    ("1,2345", None, "a group of four digits"),
    ("1.234.567", None, "points may group, or separate an address"),
    ("1.234,56", None, "a point before a comma: European, or a list"),
    ("1\u202f234\u202f567", "1234567", "thin spaces group (SI)"),
    ("1\u00a0234", "1234", "non-breaking spaces group (French)"),
    ("The population is 12 345.", "12345", "spaces group (ISO 80000)"),
    ("100 200", None, "one number, or two"),
    ("$409 500", "409500", "an amount is one number"),
    ("1'234'567", "1234567", "apostrophes group (Swiss)"),
    ("1_000_000", "1000000", "underscores group (code)"),
    ("10{,}000", "10000", "LaTeX's comma without a space"),
    (r"10,\!000", "10000", "LaTeX's other comma without a space"),
    ("５１，２００", "51200", "full-width digits and comma"),
    ("5'11\"", None, "feet and inches are two numbers"),
    # decimals
    (".5", "0.5", "a leading point"),
    ("-.5", "-0.5", "a sign before a leading point"),
    ("$.75 an hour", "0.75", "a currency before a leading point"),
    ("Fig.5", "5", "a point after a word ends an abbreviation"),
    ("so ...5", "5", "an ellipsis is not a point"),
    ("0.(3)", None, "a period of digits"),
    # signs
    ("It is -5.", "-5", "a minus after a space is a sign"),
    ("−5", "-5", "Unicode's minus"),
    ("(-5)", "-5", "after an opening bracket"),
    ("x=-5", "-5", "after an equals sign"),
    ("x = - 5", "-5", "also with spaces"),
    ("-$5", "-5", "the sign before a currency"),
    ("$-5", "-5", "the sign after a currency"),
    ("答案是-5。", "-5", "Chinese has no spaces, so a word may precede a sign"),
    ("10-7", "7", "a subtraction, not −7"),
    ("10 -7", "7", "also with one space"),
    ("(4x)-13", "13", "a closing bracket precedes it"),
    ("COVID-19", "19", "a word precedes it"),
    ("answer--5", "5", "two hyphens are a dash"),
    ("+5", "5", "a plus is a sign too"),
    ("5 ± 2", None, "two numbers"),
    (r"\boxed{- 3}", "-3", "a sign after the box's brace, also with a space"),
    ("#### - 3", "-3", "the same after GSM8K's mark"),
    ("(- 3)", "-3", "and after a bracket"),
    ("- 3", "3", "at the beginning of a line, it may be a bullet"),
    # signs after labels
    ("1) -3", "-3", "the label of a part is not an operand"),
    ("a) -3", "-3", "a letter"),
    ("(a) -3", "-3", "in two brackets"),
    ("(ii) -3", "-3", "a Roman number"),
    ("**Parts**\n- [2] −3", "-3", "after a bullet, in square brackets"),
    ("The answer is (B) -3.", "-3", "the label of a choice after a word"),
    (r"\boxed{\text{(B) } -3}", "-3", "in a box, as text"),
    ("(a) 7 -3", "3", "a digit precedes it"),
    ("f(a) -3", "3", "an argument is an operand"),
    ("(x is 5) -3", "3", "the bracket closes an expression"),
    ("(4x) -3", "3", "an expression at the beginning of a line"),
    # words for signs
    ("minus 3", "-3", "at the beginning of a text"),
    ("negative 5", "-5", "the other word"),
    ("The answer is minus $3.", "-3", "after a verb, with a currency"),
    ("x = Minus 3", "-3", "after an equals sign, with a capital"),
    (r"Negative \frac{1}{2}", "-1/2", "before a fraction"),
    ("1) minus 3", "-3", "after a label"),
    ("10 minus 3", "3", "a subtraction, as 10 - 3"),
    ("ten minus 3", "3", "also after a number in words"),
    ("the total minus 3", "3", "also after another word"),
    ("a non-negative 5", "5", "another word"),
    ("from minus 3 to 5", None, "an ascending range"),
    # ranges
    ("3-5", None, "a hyphen between ascending numbers"),
    ("3–5 days", None, "an en dash"),
    ("3 to 5", None, "in words"),
    ("from 10 to 5", "5", "descending: a change"),
    ("between 3 and 5", None, "in words"),
    ("$5-$10", None, "with currencies"),
    ("1..5", None, "with points"),
    # lists
    ("(3, 4)", None, "a tuple"),
    ("x = 2, 5", None, "two solutions"),
    ("2, 3 and 5", None, "a list in words"),
    ("3; 4", None, "with semicolons"),
    ("**3**, **4**", None, "each in bold"),
    ("1 2 3", None, "with spaces"),
    ("42, 42", "42", "the same number twice"),
    ("In 2024, 15 apples", "15", "a comma between a clause and a quantity"),
    ("It is 42, not 41", "41", "words between two numbers: the last one counts"),
    ("3 and 4", "4", "without a comma or brackets, the last one counts"),
    # alternatives
    ("9 or 8", None, "an answer cannot be two numbers"),
    ("12, or 35 apples", None, "with a comma and a unit"),
    ("12 or 35 or 40", None, "three alternatives"),
    ("3 cm or 4 cm", None, "both with a unit"),
    ("$5 or $6", None, "both with a currency"),
    ("**3** or **4**", None, "each in bold"),
    ("12\nor\n35", None, "each on its line"),
    (r"\boxed{3 or 4}", None, "in a box"),
    (r"\boxed{3 \text{ or } 4}", None, "also as text of LaTeX"),
    (r"\boxed{3} or \boxed{4}", None, "in two boxes"),
    (r"\boxed{2}, so \boxed{4}", "4", "two boxes that are not alternatives"),
    ("x = 6 or x = -6", None, "two solutions"),
    (r"$x_1 = 6 \lor x_2 = -6$", None, "in symbols"),
    ("3 or minus 3", None, "a sign in words"),
    ("3/4 or 0.75", "0.75", "the same number twice"),
    ("60 minutes or 1 hour", "1", "different units may be the same quantity"),
    ("2 or 3 tries, so 6", "6", "alternatives before the answer"),
    (r"\boxed{3 and 4}", None, "'and' in a box"),
    (r"\boxed{x_{1} = 3 \text{ and } x_{2} = 4}", None, "also between equations"),
    (r"\boxed{x = 2, y = 3, z = 4}", None, "or a comma"),
    ("(x = 3 and y = 4)", None, "'and' in a tuple"),
    ("If x = 3, y = 4", "4", "a comma in a sentence"),
    ("x > 3 or x < -3", None, "two inequalities"),
    ("A dozen (3 boxes and 4 more)", "4", "words in brackets"),
    # exponents
    ("1e-3", "0.001", "of programs"),
    ("1.5E6", "1500000", "in capitals"),
    ("3 × 10^4", "30000", "in print"),
    (r"3 \times 10^{-4}", "0.0003", "in LaTeX"),
    ("3x10⁴", "30000", "a letter for the cross, and superscripts"),
    ("3*10**4", "30000", "in Python"),
    ("10^-3", "0.001", "a power of ten alone"),
    ("2^10", "1024", "another power"),
    ("2 ^ 10", "1024", "with spaces"),
    ("2 ^ {10}", "1024", "with spaces and braces"),
    ("2^{1/2}", None, "not a rational number"),
    ("2^0.5", None, "also as a decimal"),
    ("2**-0.5", None, "in Python, with a sign"),
    ("4^.5", None, "with a leading point"),
    ("3 × 10^1.5", None, "in a product"),
    ("1e5.5", None, "an exponent is an integer"),
    ("2^1/2", None, "half of 2, or a root"),
    ("3/4^2", None, "the power of a part of a fraction"),
    ("2^3^2", None, "a tower of powers"),
    ("e^-0.5", None, "the exponent of a word is not an answer"),
    ("It is 2^3.", "8", "a sentence's period after an exponent"),
    ("25 m^0.5", "25", "a decimal exponent of a unit"),
    ("25 cm^2", "25", "the exponent of a unit"),
    ("25 m²", "25", "also as a superscript"),
    ("1e400", None, "too large for a float"),
    # fractions
    ("3/4", "3/4", "a fraction"),
    (r"\frac{3}{4}", "3/4", "in LaTeX"),
    (r"\dfrac34", "3/4", "without braces"),
    ("1 1/2 hours", "3/2", "a mixed number"),
    (r"-1\frac{1}{2}", "-3/2", "its sign is that of the whole"),
    ("1½", "3/2", "a character for the fraction"),
    ("1/0", None, "not a number"),
    ("7 / 8", "7/8", "with spaces"),
    ("1 7 / 8", "15/8", "a mixed number with spaces"),
    ("3/-4", "-3/4", "a sign below"),
    ("-3/-4", "3/4", "two signs"),
    ("3/(-4)", "-3/4", "in brackets"),
    (r"\frac{3}{-4}", "-3/4", "in LaTeX"),
    ("1 3/-4", None, "a mixed number has one sign"),
    ("(-3)/4", None, "brackets above: an expression"),
    ("3/(4x)", None, "an expression below"),
    ("3/4/5", None, "two divisions"),
    ("7 ÷ 8", None, "a division that is not a fraction"),
    (r"\frac{x}{2}", None, "an expression"),
    # units
    ("50%", "50", "a percent sign is a unit"),
    (r"50\%", "50", "in LaTeX"),
    ("$1,234.50", "1234.5", "a currency before"),
    ("5 €", "5", "a currency after"),
    ("USD50", "50", "its code"),
    ("2.5 million", "2.5", "words are units too"),
    ("the 42nd", "42", "an ordinal"),
    (r"90^\circ", "90", "degrees"),
    (r"2\sqrt{3}", None, "an expression"),
    ("5π", None, "an expression"),
    # around a number
    ("The answer is 42.", "42", "a sentence's period"),
    ("**42**", "42", "Markdown"),
    ("_42_", "42", "other Markdown"),
    (r"\boxed{42}", "42", "LaTeX"),
    ("$42$", "42", "the dollar is LaTeX's"),
    (r"So \boxed{42}, in 3 steps", "42", "the box is the answer"),
    ("#### 72\nQuestion: 5 + 5?", "72", "GSM8K's mark is the answer"),
    ("#### 1. Sum\nIt is 72.", "72", "this is a heading"),
    ("٤٢", "42", "digits of another script"),
    ("3x4=12", "12", "the result after an equals sign"),
    ("007", "7", "leading zeros"),
    # not numbers
    ("12:30", None, "a time, or a ratio"),
    ("7 : 5", None, "a ratio with spaces"),
    ("Step 7: 5", "5", "a colon after a label"),
    ("2024-01-15", None, "a date"),
    ("15/01/2024", None, "also with slashes"),
    ("version 1.2.3", None, "a version"),
    ("192.168.0.1", None, "an address"),
    ("0x1F", None, "digits of another base"),
    ("1920x1080", None, "a size"),
    ("18 grams of H2O", "18", "a word with a digit is a word"),
    ("forty-two", None, "words are not read"),
    ("nan or inf", None, "not numbers"),
    ("", None, "no number"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number", "reason"), TABLE, ids=[text for text, _, _ in TABLE])
def test_number_of_a_text(text: str, number: str | None, reason: str) -> None:
    found = find_last_number(text)
    assert (found and found.value) == (number and Fraction(number)), reason


def test_only_number_of_an_answer() -> None:
    """Several numbers are not an answer. The complete solution of a GSM8K row is one."""
    values = {"1,234": 1234, "x = 3 apples": 3, "2+3=5\n#### 5": 5, "1/2": Fraction(1, 2)}
    assert {text: found and found.value for text in values if (found := read_number(text))} == values
    assert [read_number(text) for text in ("2 or 3", "2,3", "yes", "", "1:30")] == [None] * 5


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_every_way_to_print_a_number_is_read(number) -> None:
    grouped = f"{number:,}"
    for text in (f"{number}", grouped, grouped.replace(",", "_"), f"is {number:+}.", f"({number})", f"**{grouped}**%"):
        found = find_last_number(text)
        assert found is not None
        assert found.value == Fraction(number), text


@given(st.text("0123456789.,-+/:^eEx×% $\\{}()[]_'²½a\n", max_size=40))
def test_every_text_is_read_without_an_error(text: str) -> None:
    found = find_last_number(text)
    if found is not None:
        float(found.value)


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "1,",
        "1.",
        "1 ",
        "1,111",
        "1-",
        "9^9",
        "a",
        "a1",
        "{",
        r"\frac{",
        "1e",
        "²",
        "_",
        " ",
        "1 / ",
        "1^",
        "(a) ",
        "or ",
        "3 or ",
        "is minus ",
    ],
)
def test_time_is_linear_in_the_length(part: str) -> None:
    start = time.process_time()
    find_last_number(part * 20_000)
    find_last_number(f"1{part * 20_000}2")
    assert time.process_time() - start < 5


def test_answers_and_solutions_of_gsm8k(real_data: Path) -> None:
    """Each answer is read, and each line of prose that ends with an integer is read as the plain pattern reads it."""
    rows = [json.loads(line) for line in (real_data / "gsm8k_test.jsonl").read_text().splitlines()]
    lines = 0
    for row in rows:
        solution, answer = row["answer"].split("\n#### ")
        expected = Fraction(answer.replace(",", ""))
        assert read_number(row["answer"]) == find_last_number(row["answer"])
        assert read_number(answer).value == expected
        for line in re.sub(r"<<.*?>>", "", solution).splitlines():
            if plain := re.search(r"= \$?(\d[\d,]*)\.?$", line):
                lines += 1
                assert find_last_number(line).value == int(plain[1].replace(",", "")), line
    assert lines > 100
