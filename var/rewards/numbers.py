r"""Read numbers as people write them.

The answer of a text is its last number, or the last one in its last \boxed{…} or line `#### …`. Units are not
converted: 50% is 50, 2.5 million is 2.5 and $5 is 5. What readers could take for several numbers, or for none, is not
a number: a list or tuple (2,3,5), a range (3-5), alternatives (3 or 4), a date, time, version or address, a decimal
comma, ±2, √3, 2^0.5. A text that ends with one has no answer. Words with digits (H2O, x1) and exponents of units (cm²)
are skipped.

LaTeX expressions such as 2\sqrt{3} need reward=math. docs/rewards.md has these rules with examples.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

READER_VERSION = 3
"""The version of these rules, for the fingerprints of what depends on them."""

MAX_DIGITS = 400
"""Longer numbers and larger exponents are not read: no float holds them, and a power could take all memory."""


class Number(NamedTuple):
    """A number in a text."""

    value: Fraction
    """Its exact value, which is in the range of a float."""
    text: str
    """Its text in ASCII, as written, without separators of thousands and without currency."""


class _Token(NamedTuple):
    """A part of a text that looks like a number."""

    start: int
    end: int
    number: Number | None  # None if it is not one


def find_last_number(text: str) -> Number | None:
    """Return the number that a text gives as its answer, or None."""
    text = _normalize(text)
    tokens = _find_tokens(text)
    return None if not tokens or _is_ambiguous(text, tokens) else tokens[-1].number


def read_number(text: str) -> Number | None:
    """Return the only number of a text, such as the answer of a row. None if there are several, or none."""
    text = _normalize(text)
    tokens = _find_tokens(text)
    return tokens[0].number if len(tokens) == 1 else None


# --- characters and spellings with one meaning

THIN = "\u202f"  # a narrow or non-breaking space
H = rf"[ \t{THIN}]"
CURRENCY = "$€£¥₹₩₽₿"
TABLE = str.maketrans(
    {
        **dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011\u2012", "-"),
        **dict.fromkeys("\u00a0\u2006\u2007\u2008\u2009\u200a", THIN),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"),  # invisible
        **dict.fromkeys("\u2019\u02bc\uff07", "'"),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        **dict(zip("\uff0e\uff05\uff0b\uff1d\uff1a\uff08\uff09\uff04\u3000\u066b\u066c", ".%+=:()$ .,", strict=True)),
        **dict.fromkeys("\uff0c\u3001", ", "),  # commas of Chinese text
    }
)
FULL_WIDTH_COMMA = re.compile("(?<=[\uff10-\uff19])\uff0c(?=[\uff10-\uff19])")
# Labels, such as 1) at the beginning of a line or box, and (a) also after a word. A sign may follow them.
LABEL = re.compile(
    rf"((?:(?:^[ \t>*_#-]*|(?<=\{{))(?:\\text\{{)?[(\[]?(?:\d{{1,2}}|i|[ivx]{{2,4}}|[A-Ha-h])\.?"
    rf"|(?<=[A-Za-z][a-z:] )[(\[][A-Ha-h]))[)\]](?:{H}*\}}{H}*|{H}+)(?=[-–]|(?i:minus|negative){H})",
    re.MULTILINE,
)
# Words for the sign. After a word that is not in this list, or a number, "minus" is a subtraction.
BEFORE_MINUS = (
    r"is|was|are|be|equals?|to|of|and|or|than|by|at|from|about|around|above|below|exactly|gives?|gets?|answer"
)
MINUS = re.compile(
    rf"(?:((?:^|[:=≈<>(\[{{*\"“`]|\b(?:{BEFORE_MINUS}){H}){H}*)(?i:minus)|(?<![\w-])(?i:negative)){H}+"
    rf"(?=(?:\\?[{CURRENCY}])?\.?\d|\\[cdt]?frac)",
    re.MULTILINE,
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SPELLINGS = (
    (re.compile(r"(?![0-9])\d"), lambda found: str(unicodedata.decimal(found[0]))),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+"), lambda found: "^" + found[0].translate(SUPERSCRIPTS)),
    (re.compile(r"(\d?)([¼-¾⅐-⅞])"), lambda found: " ".join(filter(None, (found[1], _spell_fraction(found[2]))))),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[,;: ]"), THIN),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\pm(?![A-Za-z])|\+/-"), "±"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "°"),
    (re.compile(r"\^\s*(?:\\[a-z]+)?\{?(?:st|nd|rd|th)\b\}*"), ""),  # 42^{nd}
    (re.compile(r"\\(?:text|textrm|mathrm|mbox)\{\s*(and|or)\s*\}"), r" \1 "),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), " or "),
    (re.compile(r"\\q?quad(?![A-Za-z])"), " "),
    (LABEL, r"\1: "),
    (MINUS, r"\1-"),
)


def _normalize(text: str) -> str:
    """Return the text that the reader sees: the last marked answer in braces, or else all of it, in one spelling."""
    text = FULL_WIDTH_COMMA.sub(",", text).translate(TABLE)
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    marked = [found for found in MARKED.finditer(text) if found[1] or found[2]]
    if not marked:
        return text
    answers = [(found[1] or found[2]).strip() for found in marked]
    between = MARKUP.sub("", text[marked[-2].end() : marked[-1].start()]) if len(marked) > 1 else ""
    return "{" + (" or ".join(answers[-2:]) if ALTERNATIVE.fullmatch(between) else answers[-1]) + "}"


def _spell_fraction(character: str) -> str:
    return unicodedata.normalize("NFKC", character).replace("\u2044", "/")


# --- what looks like a number

BRACES = r"\{(?:[^{}]|\{[^{}]*\})*\}"
BOX = rf"\\f?box(?:ed)?\s*\{{\s*((?:[^{{}}]|{BRACES})*?)\s*\}}"
MARKED = re.compile(rf"{BOX}|^[ \t]*####([^A-Za-z\n]*\d[^A-Za-z\n]*)$", re.MULTILINE)  # "#### 3. Proof" is a heading
LETTER = "A-Za-zªµºÀ-ɏͰ-ԯ"  # alphabets with spaces between words: in 答案是-5 the minus is a sign
CODES = "USD|EUR|GBP|CAD|AUD|INR|JPY|CNY|CHF|Rs|RM|NT|HK|kr"  # currencies, before a number without a space
GROUPED = "|".join(rf"[1-9]\d{{0,2}}(?:{mark}\d{{3}})+(?![{mark},]?\d)" for mark in (",", THIN, "'", "_"))
# 1 234. With three digits before the space it may be a list, unless it is an amount.
SPACED = rf"(?:(?<!\d )[1-9]\d?|(?<=[{CURRENCY}])[1-9]\d{{0,2}})(?: \d{{3}})+(?![ ,/]?\d)"
UNSIGNED = rf"(?:(?:{GROUPED}|{SPACED}|\d+)(?:\.\d+)?|(?<![\w.)\]}}])\.\d+)"
# A minus is a sign unless a digit, word or closing bracket precedes it, also a digit and a space.
SIGN = rf"(?:(?<=[=≈(\[{{]) ?[-–] ?|(?<![{LETTER}\d)\]}}%.–-])(?<![\d)\]}}%][ {THIN}$*`])[-–+])"
SIGNED = rf"[-+]?{H}?{UNSIGNED}"  # part of a fraction
POWER = rf"(?:\^{H}?|\*\*)(?:\{{[-+]?\d+\}}|\([-+]?\d+\)|[-+]?\d+)"
EXPONENT = rf"{H}?\^{H}?(?:{BRACES}|[-+]?(?:\w+(?:[./]\d+)*|\.\d+))"  # of a word or an expression
TIMES = r"(?:[×xX*·⋅∙]|\\times|\\cdot)"
KINDS = {
    "decimal": r"(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+(?!\w)",
    "scientific": rf"{UNSIGNED}{H}*{TIMES}{H}*10{H}?{POWER}",
    "latex": rf"(?:\d+{H}*)?\\[cdt]?frac(?:\{{{H}*{SIGNED}{H}*\}}|\d)(?:\{{{H}*{SIGNED}{H}*\}}|\d)",
    "time": r"\d+(?::\d+)+(?:[\w:.+-]*\w)?",  # also a ratio
    "chain": r"\d+(?P<mark>[./-])\d+(?:(?P=mark)\d+)+(?:[\w:.+/-]*\w)?",  # 1.2.3, 2024-01-15, 555-123-4567
    "mixture": r"\d[\d.]*[A-Za-z]+\d\w*",  # 0x1F, 1920x1080
    "periodic": rf"\d+\.\d*(?:\(\d+\)|\\(?:overline|bar|dot){BRACES})",  # 0.(3)
    "symbol": rf"[√±]{H}*{UNSIGNED}|\\sqrt(?:\[[^]]*\])?(?:{BRACES}|\d+)|\\[cdt]?frac{BRACES}{BRACES}",
    "bracket": rf"(?<=[)\]]){EXPONENT}",  # the power of an expression
    "fraction": rf"(?:\d+[ {THIN}])?{UNSIGNED}{H}*/{H}*(?:{SIGNED}|\({SIGNED}\))",
    "power": rf"{UNSIGNED}{H}?{POWER}",
    "root": rf"{UNSIGNED}{H}?\^{H}?(?:{BRACES}|\([^()]*\))",  # 2^{1/2}
    "plain": UNSIGNED,
}
WORD = "|".join(
    (
        r"\\[A-Za-z]+",
        rf"(?<![{LETTER}\d_])(?!(?:{CODES})[\d.])[{LETTER}][{LETTER}_]*\d\w*(?:\.\d\w*)*",  # H2O, x_1, v1.2.3
        rf"(?<=[{LETTER}}}]){EXPONENT}",  # cm^2
        rf"_{BRACES}",
    )
)
TOKEN = re.compile(
    rf"(?P<sign>{SIGN})?(?:[{CURRENCY}]{H}?(?P<inner>[-–])?)?"
    rf"(?:{'|'.join(f'(?P<{kind}>{pattern})' for kind, pattern in KINDS.items())})"
    rf"(?:{H}?[%‰{CURRENCY}¢°](?!\d))?|(?P<word>{WORD})"
)
GOES_ON = re.compile(rf"{H}*(?:π|√|\\pi|\\sqrt|\^)|\.\d")  # the token is the beginning of an expression


def _find_tokens(text: str) -> list[_Token]:
    """Return what looks like a number, in order."""
    tokens = []
    for found in TOKEN.finditer(text):
        kind = str(found.lastgroup)
        if kind != "word":
            negative = (found["sign"] or found["inner"] or "").strip() in ("-", "–")
            number = None if GOES_ON.match(text, found.end()) else _compute(kind, found[kind], negative)
            tokens.append(_Token(found.start(), found.end(), number))
    return tokens


def _compute(kind: str, text: str, negative: bool) -> Number | None:
    """Return the number of a token. None if its kind is not a number, or if a float cannot hold it."""
    try:
        value = _evaluate(kind, re.sub(rf"[,'_{THIN}](?=\d{{3}})", "", text))
        float(value)
    except (ArithmeticError, ValueError):
        return None
    if kind == "plain":
        text = re.sub(rf"[,'_ {THIN}]", "", text)
    elif kind == "fraction":
        text = re.sub(rf"{H}*/{H}*", "/", text)
    return Number(-value if negative else value, "-" * negative + text)


def _evaluate(kind: str, text: str) -> Fraction:
    """Return the value of a token without its sign. Raise an ArithmeticError or a ValueError if it has none."""
    if len(text) > MAX_DIGITS:
        raise OverflowError
    if kind == "plain":
        return Fraction(text.replace(" ", ""))
    if kind in ("decimal", "scientific", "power"):
        base, exponent = re.split(rf"[eE]|{TIMES}{H}*10{H}?(?:\^|\*\*)|\^|\*\*", text, maxsplit=1)
        power = int(exponent.strip(f"{{}}() \t{THIN}"))
        if abs(power) > MAX_DIGITS:
            raise OverflowError
        number = Fraction(re.sub(rf"[ {THIN}]", "", base))
        return number**power if kind == "power" else number * Fraction(10) ** power
    if kind in ("fraction", "latex"):
        whole, above, below = _split_fraction(text)
        if whole is not None and not 0 < above < below:  # 12 5/2 is two numbers
            raise ValueError
        return (whole or 0) + above / below
    raise ValueError(f"{kind} is not a number")


def _split_fraction(text: str) -> tuple[Fraction | None, Fraction, Fraction]:
    """Return the whole part of a fraction or None, its numerator and its denominator."""
    head, frac, tail = re.split(r"(\\[cdt]?frac|/)", text)
    if frac == "/":
        *whole, above = re.split(rf"[ {THIN}]", head.strip(), maxsplit=1)
        below = tail.strip("() ")
    else:
        whole = head.split()
        above, below = (braced or digit for braced, digit in re.findall(r"\{([^{}]*)\}|(\d)", tail))
    above, below = (re.sub(H, "", part) for part in (above, below))
    return Fraction(whole[0]) if whole else None, Fraction(above), Fraction(below)


# --- numbers that belong together

MARKUP = re.compile(r"\*\*|[`$\"“”]|\\[()\[\]]|\\l?dots")
SEPARATOR = re.compile(rf"{H}*[,;]{H}*|{H}+")
AND = re.compile(rf"(?:{H}*+,)?{H}++(?:and|or|&){H}+")
VARIABLE = rf"\\?[^\W\d_]\w*(?:_{BRACES})?{H}*(?:[=≈<>≤≥]|\\[lg]eq?)\s*"
ALTERNATIVE = re.compile(
    rf"(?:\s*+,)?\s*+(?:(?P<or>\b(?i:or))|\band|&)\s+(?:{VARIABLE})?|\s*+[,;]\s*{VARIABLE}"  # x = 3 or x = 4
)
UNIT = re.compile(rf"{H}*(?:\\[a-z]+{BRACES}|[^\W\d_]+)")
IN_BRACKETS = re.compile(r"^\{|[(\[{][^()\[\]{}]*$")  # a marked answer begins with a brace
# Numbers of one expression: 5'11, 2^0.5 (its tokens are 2^0 and 5), 3/4/5, 7 : 5
JOINED = re.compile(rf"['_.]?|[)\]}}]*{H}*(?:[/÷^]|\\div){H}*[(\[{{]*|{H}+:{H}*")
RANGE = re.compile(rf"(?:{H}?[A-Za-z]{{2,3}})?(?:-|{H}*–{H}*|—)|{H}*(?:\.{{2,3}}|…|~){H}*|{H}+to{H}+")
CONTINUES = re.compile(rf"{H}*(?:[^\W\d_]|[=+*×÷/<>≈-]|\\[a-z])")


def _is_ambiguous(text: str, tokens: list[_Token]) -> bool:
    """Return whether the last token is part of an expression, or of alternatives, a list or a range that differ."""
    gaps = [MARKUP.sub("", text[one.end : other.start]) for one, other in pairwise(tokens)]
    if not gaps:
        return False
    if JOINED.fullmatch(gaps[-1]):
        return True
    before, last = tokens[-2].number, tokens[-1].number
    preceding, following = text[: tokens[-2].start], MARKUP.sub("", text[tokens[-1].end :])
    if before is not None and last is not None and before.value < last.value:
        between = re.search(rf"between{H}+[^\s\d]?$", preceding) and AND.fullmatch(gaps[-1])
        if between or RANGE.fullmatch(gaps[-1]):  # 10-7 descends, so it is a subtraction
            return True
    unit = UNIT.match(following)
    found = ALTERNATIVE.fullmatch(gaps[-1].removeprefix(unit[0] if unit else ""))  # 3 cm or 4 cm
    if found and (found["or"] or IN_BRACKETS.search(preceding)) and _differ(tokens[-2:]):
        return True
    joined = AND.fullmatch(gaps[-1]) is not None and len(gaps) > 1
    first = len(gaps) - joined
    while first > 0 and SEPARATOR.fullmatch(gaps[first - 1]):
        first -= 1
    members = tokens[first:]
    if len(members) < 2 + joined or not _differ(members):
        return False
    return len(members) > 2 or not CONTINUES.match(following)  # In 2024, 15 apples


def _differ(tokens: list[_Token]) -> bool:
    return len({None if one.number is None else one.number.value for one in tokens}) > 1
