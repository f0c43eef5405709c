"""One way of writing for what people and models write in many: Unicode, LaTeX spacing, text commands."""

from __future__ import annotations

import math
import re
import unicodedata

_SIGNS = {
    "\u2212": "-", "\u2012": "-", "\u2010": "-", "\u2011": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ", "\u2217": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u2236": ":",
    "\u00b1": r"\pm ", "\u2213": r"\mp ",
    "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2a7d": r"\le ", "\u2a7e": r"\ge ",
    "\u2260": r"\ne ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ", "\u2220": r"\angle ", "\u03c0": r"\pi ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ", "\u2124": r"\mathbb{Z}", "\u211d": r"\mathbb{R}", "\u211a": r"\mathbb{Q}",
    "\u2115": r"\mathbb{N}", "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'",
}  # fmt: skip
_UPPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWER = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SPACES = "\u00a0\u2009\u202f\u2007"


def plain(text: str) -> str:
    """``text`` in ASCII and LaTeX as far as mathematics goes; NFKC has the rest (full-width, say)."""
    if text.isascii():
        return text
    text = re.sub(rf"(?<=\d)[{_SPACES}](?=\d{{3}}(?!\d))", "", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_UPPER)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_LOWER)}}}", text)
    text = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # 1½ is 1 1/2
    text = re.sub(r"[\u2013\u2014](?=[\d.\\(a-zA-Z])", "-", text)  # a dash before a number, not between words
    text = re.sub(r"[\u221a](\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"[\u221a]\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\u221b(\d+|[a-zA-Z])", r"\\sqrt[3]{\1}", text)
    text = "".join(_SIGNS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(_SIGNS.get(c, c) for c in text)  # NFKC makes some of the signs too


_FRAC = re.compile(r"\\frac\s*(\d)\s*(\d)|\\frac\s*(\d)\s*(?=\{)|(\\frac\s*\{[^{}]*\})\s*(\d)")
_GONE = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|hfill|boldsymbol|strut)(?![a-zA-Z])"
    r"|\\!|(?<!\\)\$|\\[()\[\]](?![a-zA-Z])|\\(?:qquad|quad)|\\thinspace(?![a-zA-Z])|\\color\s*\{\w+\}"
    r"|\\(?:label|tag\*?)\s*\{[^{}]*\}"
)
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathbf|mathsf|mathit|mathtt|bf"
    r"|operatorname\*?|emph|underline|overline(?=\{\\text)|ensuremath|textcolor\{\w+\}|mathord)\s*\{([^{}]*)\}"
)


# Recurring decimals: 0.1\\dot{6}, 0.\\dot{1}42\\dot{8}, 0.333..., 0.1616\\ldots
_DOTTED = re.compile(r"\.(\d*)\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?")
_GOES_ON = re.compile(r"(\.\d{0,30}?)(?:(\d)\2{2,30}|(\d{2,15}?)\3{1,9})\s*(?:\\[lc]?dots(?![a-z])|\.{3})")
_ROUND = re.compile(r"(?<=\d)\.\((\d{1,30})\)")  # 0.(3)
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:text|textrm|mathrm)\s*\{\s*)?(st|nd|rd|th)\s*\}{1,2}")
_OVER = re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}|^(\w+)\s*\\choose\s*(\w+)$")  # {7 \choose 5}
_WITHOUT = re.compile(  # \mathbb{R} - \{0\}
    r"(\\mathbb\s*(?:\{\s*[CNQRZ]\s*\}|[CNQRZ]))\s*(?:-|\\backslash(?![a-zA-Z])|\\smallsetminus(?![a-zA-Z]))"
    r"\s*(?=\\\{)"
)
_NAMED = r"\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*(\^\s*\{?\d\}?)?\s*\}"
_QUOTIENT = re.compile(rf"\\[dt]?frac\s*{_NAMED}\s*{_NAMED}")  # of units
_ASCII = [  # plain notation for LaTeX's
    (re.compile(r"\*\*(?=\s*[-({\d\w])"), "^"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<=\d)(?:\s*[x*]\s*(?=10\s*\^)|\sx\s(?=\d))"), r" \\times "),
    (re.compile(r"\^\s*(?:\{\s*0?\.5\s*\}|0?\.5(?!\d))"), r"^{1/2}"),
    (
        re.compile(
            r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?)\s*[)}]?"
        ),
        r"\1(\\frac{\2\\pi}{180})",
    ),
    (re.compile(r"^(?:negative|minus)\s+(?=\d)", re.IGNORECASE), "-"),
    (re.compile(r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"^(?:the limit )?does not exist$", re.IGNORECASE), "DNE"),
    (re.compile(r"(?<=\d)\s*,?\s*(?:remainder|rem\.?|R)(?![a-zA-Z])\s*(?=\d)"), " R "),
    (re.compile(r"(?<![\d.\w}/])(\d+)\s*/\s*(\d+)\s*(?=\\(?:sqrt|pi)(?![a-z]))"), r"\\frac{\1}{\2}"),
]


EUROPEAN = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?!\d)(?!,)")  # 1.234,50
_DOUBLE = re.compile(r"(?<![\w.!)}\]])(\d{1,2})\s?!!(?!!)")  # 7!! = 7 * 5 * 3 * 1
_DEGREES = re.compile(
    r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|(?:\\degree|(?<=\d)\s*\\deg)(?![a-zA-Z])"
)
_TOWER = re.compile(r"\^\s*\{\s*(\d)\s*\^\s*(?:\{\s*)?(\d)(?:\s*\})?\s*\}")
_CHOOSE = re.compile(  # {}^8C_3, {}_8C_3, C_8^3
    r"(?:\{\s*\})?\s?[\^_]\s?\{?\s?(\d{1,3})\s?\}?\s?([CP])\s?_\s?\{?\s?(\d{1,3})\s?\}?"
    r"|(?<![\\\w])(C)_\{?(\d{1,3})\}?\s?\^\s?\{?(\d{1,3})\}?"
)


def _chosen(match: re.Match[str]) -> str:
    count = math.perm if match[2] == "P" else math.comb
    return str(count(int(match[1] or match[5]), int(match[3] or match[6])))


def _tower(match: re.Match[str]) -> str:
    power = int(match[1]) ** int(match[2])
    return f"^{{{power}}}" if power < 1000 else match[0]


def tidy(text: str) -> str:
    r"""An answer without what does not change its meaning: delimiters, sizes, spacing, kinds of fraction.

    Words keep a space around them: ``5\text{cm}`` becomes ``5 cm``.
    """
    text = re.sub(r"(?<!\\)\\$", "", plain(text).strip())  # the end of "12\ "
    text = re.sub(r"\\\$\s*(\d[\d.,]*)(?![\d.,]*\s*(?:[a-zA-Z\\{^*/]))", r"\1 dollars ", text)
    text = text.replace("\\\\%", "\\%").replace(r"\$", "$").replace(r"\%", "%")
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    text = re.sub(r"(?<![a-z])\{:\}", ":", text)
    text = _OVER.sub(r"\\binom{\1\3}{\2\4}", text)
    text = _WITHOUT.sub(r"\1\\setminus ", _ORDINAL.sub(r"\1", text))
    text = _QUOTIENT.sub(r" \1\2/\3\4", text)
    text = re.sub(r"(?<=\d)\s*[{]\s*,\s*[}]\s*", ",", text)
    text = re.sub(r"(\d)(?:\\!)?,?\\[!,;:]\s*(?=\d{3}(?!\d))", r"\1", text)  # 1\,000 and 35,\!280
    text = re.sub(r"\s+", " ", _GONE.sub(" ", text))  # long runs of blanks make the patterns below slow
    for _ in range(3):  # commands inside commands
        text = _WORDS.sub(lambda m: f" {m[1]} ", text)
    if "\\begin" not in text:
        text = re.sub(r"\\[,;:> ]|~|\\\s", " ", re.sub(r"\s*,?\s*\\\\\s*", ", ", text))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(leq|geq)(?:slant)?(?![a-zA-Z])", lambda m: "\\" + m[1][:2], text)
    text = re.sub(r"\\frac\s+", r"\\frac", text)
    text = _FRAC.sub(_fraction, text)
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\langle", "(").replace(r"\rangle", ")")
    text = _ROUND.sub(r".\\overline{\1}", text)
    text = _DOTTED.sub(r".\1\\overline{\2\3\4}", text)
    text = _GOES_ON.sub(lambda m: f"{m[1]}\\overline{{{m[2] or m[3]}}}", text)
    text = re.sub(r"\d{0,300}\.(\d{0,300})\\overline\s*\{(\d{1,300})\}", _recurring, text)
    text = EUROPEAN.sub(european, text)
    text = re.sub(r"(?<=\d)\s*\\Omega(?![a-zA-Z])", " ohm", text)
    text = re.sub(r"(?<=\d)\s*\\mu\s*(?=[a-zA-Z]\b)", " micro", text)
    text = re.sub(r"(?<=\d) *([aApP])\.?\s?([mM])\b\.?", r" \1\2", text)
    text = re.sub(r"(?<=\d) ?: ?(?=\d)", ":", text.strip())
    for pattern, written in _ASCII:
        text = pattern.sub(written, text)
    text = re.sub(r"^(?:about|approximately|approx\.?|roughly|around)\s+(?=\S*\d)", "", text.strip())
    text = re.sub(r"(?<=\d)\s*\((?:approx|about|rounded)[^()]*\)$", "", text)
    if cases := re.fullmatch(r"\\begin\{(?:cases|aligned)\}(.*)\\end\{(?:cases|aligned)\}", text, re.DOTALL):
        text = re.sub(r",?\s*\\\\\s*", ", ", cases[1].replace("&", ""))
    text = _DOUBLE.sub(lambda m: str(math.prod(range(int(m[1]), 0, -2))), text)
    text = _CHOOSE.sub(_chosen, _TOWER.sub(_tower, text))
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z])(?![a-zA-Z])", r"\\sqrt{\1}", text)
    text = _DEGREES.sub(" degrees ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text.strip("*` ").rstrip(" .,;:") if not text.endswith("...") else text.strip("*` ")


def _recurring(match: re.Match[str]) -> str:
    """A recurring decimal as the fraction that it is."""
    whole, period = match[0].split(".")[0] + match[1], match[2]
    return f"\\frac{{{int(whole + period) - int(whole or 0)}}}{{{'9' * len(period)}{'0' * len(match[1])}}}"


def european(match: re.Match[str]) -> str:
    return f"{match[1].replace('.', '')}.{match[2]}"


def _fraction(match: re.Match[str]) -> str:
    if match[1]:
        return f"\\frac{{{match[1]}}}{{{match[2]}}}"
    return f"\\frac{{{match[3]}}}" if match[3] else f"{match[4]}{{{match[5]}}}"


def balanced(text: str) -> bool:
    """Whether the braces of ``text`` match, escaped ones aside."""
    depth = 0
    for char in re.sub(r"\\[{}]", "", text):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def squeeze(text: object) -> str:
    """White space and the encoding of accents aside: one blank for each run of it."""
    return unicodedata.normalize("NFC", " ".join(str(text).split()))
