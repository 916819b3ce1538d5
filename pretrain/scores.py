"""How good an output is: ROUGE and BLEU of characters, the value of an equation, correlation of
ranks, whitening. Plain arithmetic, no model.

Titles and summaries (kexue.fm/archives/8209): both texts lowered, a token is a character; ROUGE-1,
-2 and -L are F scores as the package `rouge` gives them, BLEU is nltk's sentence_bleu with method1
smoothing; a sample's empty output scores 0 and counts. Equations: kexue.fm/archives/7809. Whitening
of sentence vectors: kexue.fm/archives/8069.

Legend: P pairs, D hidden, K dimensions kept.
"""

import ast
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SMOOTHED = 0.1
"""nltk's method1: what stands for no match of n-grams."""
LONGEST_EQUATION, LARGEST_POWER = 1000, 100.0


class NotArithmetic(ValueError):
    """A text that is no arithmetic, or has no value."""


# ---------------------------------------------------------------- titles


def title_scores(output: str, reference: str) -> dict[str, float]:
    """rouge-1, rouge-2, rouge-l (F) and bleu of one output, each from 0 to 1."""
    mine, wanted = _sentences(output), _sentences(reference)
    if not any(mine) or not any(wanted):
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0, "bleu": 0.0}
    return {
        "rouge-1": rouge_n(mine, wanted, 1),
        "rouge-2": rouge_n(mine, wanted, 2),
        "rouge-l": rouge_l(mine, wanted),
        # a blank is two empty tokens to nltk, as the texts were joined and split
        "bleu": bleu(*(" ".join(text.lower()).split(" ") for text in (output, reference))),
    }


def _sentences(text: str) -> list[list[str]]:
    """Characters without blanks, in lower case; a full stop of ASCII ends a sentence and is gone,
    as the package reads its texts."""
    return [list("".join(part.split())) for part in text.lower().split(".") if part.strip()]


def _joined(sentences: list[list[str]]) -> list[str]:
    return [token for sentence in sentences for token in sentence]


def rouge_n(output: list[list[str]], reference: list[list[str]], n: int) -> float:
    """F of the distinct n-grams: the package counts each once, however often it stands there."""
    mine, wanted = (set(_grams(_joined(text), n)) for text in (output, reference))
    return _f(len(mine & wanted), len(mine), len(wanted))


def rouge_l(output: list[list[str]], reference: list[list[str]]) -> float:
    """F of the longest common subsequences of all pairs of sentences, united; of them too the
    package counts each token once."""
    common = {token for one in reference for other in output for token in _subsequence(one, other)}
    return _f(len(common), len(set(_joined(output))), len(set(_joined(reference))))


def bleu(output: Sequence[str], reference: Sequence[str]) -> float:
    """Geometric mean of the clipped precisions of 1- to 4-grams, times the brevity penalty."""
    logs = 0.0
    for n in range(1, 5):
        mine, wanted = Counter(_grams(output, n)), Counter(_grams(reference, n))
        matches = sum((mine & wanted).values())
        if n == 1 and matches == 0:
            return 0.0
        logs += math.log((matches or SMOOTHED) / max(1, sum(mine.values())))
    brevity = min(0.0, 1 - len(reference) / len(output))
    return math.exp(brevity + logs / 4)


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _f(common: int, mine: int, wanted: int) -> float:
    precision = common / mine if mine else 0.0
    recall = common / wanted if wanted else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


def _subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one that `rouge` walks back to."""
    lengths = np.zeros((len(a) + 1, len(b) + 1), np.int64)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            same = lengths[i - 1, j - 1] + 1
            lengths[i, j] = same if x == y else max(lengths[i - 1, j], lengths[i, j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1, j] > lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


# ---------------------------------------------------------------- equations


_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def value(text: str) -> float:
    """The value of an arithmetic text: numbers, + - * / ** and brackets, nothing else is run.

    Raises NotArithmetic for anything else, division by zero, or a value that is no finite number.
    """
    if len(text) > LONGEST_EQUATION:
        raise NotArithmetic(f"the equation has {len(text)} characters, at most {LONGEST_EQUATION}")
    try:
        found = _valued(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise NotArithmetic(f"'{text[:40]}' is no arithmetic: {error}") from None
    if not math.isfinite(found):
        raise NotArithmetic(f"'{text[:40]}' has no finite value")
    return found


def _valued(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
        if isinstance(node.value, int | float):
            return float(node.value)
        raise NotArithmetic("only numbers are read")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        inner = _valued(node.operand)
        return inner if isinstance(node.op, ast.UAdd) else -inner
    if isinstance(node, ast.BinOp):
        left, right = _valued(node.left), _valued(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) <= LARGEST_POWER:
            power: Any = left**right
            if isinstance(power, float):
                return power
        elif type(node.op) in _BINARY:
            return _BINARY[type(node.op)](left, right)
    raise NotArithmetic("only numbers, + - * / ** and brackets are read")


def same_value(output: str, answer: str) -> bool:
    """Whether an output has the value of the answer to 6 decimals; what has none is wrong."""
    try:
        return round(value(output), 6) == round(value(answer), 6)
    except NotArithmetic:
        return False


# ---------------------------------------------------------------- similarity


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Correlation of the ranks of two lists, ties at their mean rank; 0 where one is constant."""
    ranks = [_ranks(np.asarray(x, np.float64)) for x in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm else 0.0


def _ranks(x_P: Floats) -> Floats:
    _, where, count = np.unique(x_P, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[where]


def whitened(vectors_PD: Floats, kept: int | None = None) -> Floats:
    """(x - mean) U L^-1/2 [P, K] of the covariance U L U^T, the K largest directions.

    Directions without spread (below 1e-12 of the largest) are left out.
    """
    centred_PD = vectors_PD - vectors_PD.mean(0)
    spread_D, turn_DD = np.linalg.eigh(centred_PD.T @ centred_PD / len(centred_PD))
    order = np.argsort(-spread_D)
    order = order[spread_D[order] > 1e-12 * max(float(spread_D.max()), 1e-300)][:kept]
    out: Floats = centred_PD @ (turn_DD[:, order] / np.sqrt(spread_D[order]))
    return out


def cosine(a_PD: Floats, b_PD: Floats) -> Floats:
    """Cosine of each pair of rows; 0 where one is nothing."""
    norms = np.linalg.norm(a_PD, axis=1) * np.linalg.norm(b_PD, axis=1)
    out: Floats = (a_PD * b_PD).sum(1) / np.where(norms > 0, norms, 1.0)
    return out
