"""ape210k: mathematical problems in words, cleaned as they were when 75 % of them were solved.

    {original_text, equation, ans} -> mixed numbers, fractions, percents written out
        -> equation without x= and without brackets that change nothing
        -> kept if the equation has the value of the answer

Su, kexue.fm/archives/7809 and bert4keras' example; nothing that is read is run (scores.value).
"""

import re
from typing import NamedTuple

from pretrain.scores import NotArithmetic, value

_MIXED = re.compile(r"(\d+)\((\d+/\d+)\)")
_BEFORE_BRACKET = re.compile(r"(\d+)\(")
_FRACTION = re.compile(r"\((\d+/\d+)\)")
_PERCENT = re.compile(r"([.\d]+)%")


class Problem(NamedTuple):
    """A cleaned problem."""

    question: str
    equation: str
    answer: str
    """Arithmetic too: 45, (11/20)."""


def cleaned(question: str, equation: str, answer: str) -> Problem | None:
    """The problem as it is asked, or None if its equation has not the value of its answer."""
    question, equation, answer = (
        _MIXED.sub(r"(\1+\2)", text) for text in (question, equation, answer)
    )
    equation, answer = (_BEFORE_BRACKET.sub(r"\1+(", text) for text in (equation, answer))
    question = _FRACTION.sub(r"\1", question)
    equation, answer = (
        _PERCENT.sub(r"(\1/100)", text).replace(":", "/").replace("%", "/100")
        for text in (equation, answer)
    )
    equation = equation.removeprefix("x=")
    try:
        if round(value(equation), 6) != round(value(answer), 6):
            return None
        return Problem(question, without_brackets(equation), answer)
    except NotArithmetic:
        return None


def without_brackets(equation: str) -> str:
    """The equation without those pairs of brackets that its value does not need, tried one after
    another as they close. NotArithmetic if it has no value."""
    wanted = round(value(equation), 6)
    opened: list[int] = []
    pairs = []
    for place, sign in enumerate(equation):
        if sign == "(":
            opened.append(place)
        elif sign == ")":
            pairs.append((opened.pop(), place))
    signs = list(equation)
    for pair in pairs:
        tried = ["" if place in pair else sign for place, sign in enumerate(signs)]
        try:
            if round(value("".join(tried)), 6) == wanted:
                signs = tried
        except NotArithmetic:
            continue
    return "".join(signs)
