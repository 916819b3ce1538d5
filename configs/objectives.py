"""What a model is trained to do: the `objective` section of a run; its name decides the rest.

    causal                     the next token                                 cpm
    masked                     tokens or words that were hidden               roformer
    pseudo_summary             gap sentences out of the others                t5_pegasus
    span_corruption            spans that were cut out                        t5_pegasus
    prefix                     the rest of a row out of its head              t5_pegasus
    pairs                      one named field out of others                  t5_pegasus
    labels                     the class of a text or of a pair of texts      roformer

Sources: masked: RoFormer, RoFormerV2 and bert4keras' pretraining/ (Su); pseudo_summary: T5 PEGASUS
(Su, kexue.fm/archives/8209); span_corruption: T5 (Raffel et al. 2020); prefix: UniLM (Dong et al.
2019), as an encoder and a decoder see it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Packing = Literal["windows", "documents", "best_fit"]


@dataclass(frozen=True)
class Causal:
    """Predict the next token."""

    name: Literal["causal"] = "causal"
    """The objective."""
    document_boundaries: bool = True
    """Attention and positions stay inside a document; false lets a row read across borders."""

    families: ClassVar[tuple[str, ...]] = ("cpm",)
    packings: ClassVar[tuple[Packing, ...]] = ("windows", "documents", "best_fit")


@dataclass(frozen=True)
class Masked:
    """Predict what was hidden."""

    name: Literal["masked"]
    """The objective."""
    masking: Literal["token", "word", "word_token"] = "word"
    """token: each token is drawn on its own (WoBERT, RoFormer v1); word: one draw decides for all
    tokens of a word (RoFormer v2); word_token: a word is drawn, then each of its tokens is hidden,
    kept or replaced by its own draw (bert4keras' RoBERTa)."""
    ratio: float = 0.15
    """Of the tokens or words: 8 of 10 become [MASK], 1 stays, 1 is another at random."""
    mask_special: bool = False
    """Draw [CLS], [SEP] and ends of documents too, as WoBERT and RoFormer v1 did."""
    document_boundaries: bool = True
    """Attention and positions stay inside a document; false lets a row read across borders."""

    families: ClassVar[tuple[str, ...]] = ("roformer",)
    packings: ClassVar[tuple[Packing, ...]] = ("windows", "documents", "best_fit")

    def problems(self) -> list[str]:
        """A share that is none."""
        return _share("ratio", self.ratio)


@dataclass(frozen=True)
class PseudoSummary:
    """Write the gap sentences of a text out of its other sentences."""

    name: Literal["pseudo_summary"]
    """The objective."""
    source_tokens: int = 384
    """The longest source, [CLS] and [SEP] included; what is over is cut off."""
    target_tokens: int = 128
    """The longest target, [CLS] and [SEP] included."""

    document_boundaries: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("t5_pegasus",)
    packings: ClassVar[tuple[Packing, ...]] = ("best_fit", "documents")

    def problems(self) -> list[str]:
        """Lengths without room for a token."""
        return _lengths(self.source_tokens, self.target_tokens)


@dataclass(frozen=True)
class SpanCorruption:
    """Write the spans that were cut out of a row and stand there as sentinels."""

    name: Literal["span_corruption"]
    """The objective."""
    ratio: float = 0.15
    """Share of the tokens that are cut out."""
    span: float = 3.0
    """Tokens of a span, on average."""

    document_boundaries: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("t5_pegasus",)
    packings: ClassVar[tuple[Packing, ...]] = ("windows", "documents")

    def problems(self) -> list[str]:
        """A share or a length that is none."""
        found = [] if self.span >= 1 else [f"span: is {self.span}, must be at least 1"]
        return found + _share("ratio", self.ratio)


@dataclass(frozen=True)
class Prefix:
    """Write the rest of a row out of its head, which ends anywhere."""

    name: Literal["prefix"]
    """The objective."""

    document_boundaries: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("t5_pegasus",)
    packings: ClassVar[tuple[Packing, ...]] = ("windows", "documents")


@dataclass(frozen=True)
class Pairs:
    """Write a named field of a document out of others of its fields."""

    name: Literal["pairs"]
    """The objective."""
    source: tuple[str, ...] = ("source",)
    """Fields of the source, one after another as they stand in the document."""
    target: tuple[str, ...] = ("target",)
    """Fields of the target."""
    source_tokens: int = 384
    """The longest source, [CLS] and [SEP] included; what is over is cut off."""
    target_tokens: int = 128
    """The longest target, [CLS] and [SEP] included."""

    document_boundaries: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("t5_pegasus",)
    packings: ClassVar[tuple[Packing, ...]] = ("best_fit", "documents")

    def problems(self) -> list[str]:
        """Fields that are missing or on both sides; lengths without room for a token."""
        found = [
            f"{side}: names no field; give a list of names (须有字段名)"
            for side in ("source", "target")
            if not getattr(self, side)
        ]
        if both := set(self.source) & set(self.target):
            found.append(f"source, target: both name {', '.join(sorted(both))} (字段重复)")
        return found + _lengths(self.source_tokens, self.target_tokens)


@dataclass(frozen=True)
class Labels:
    """Tell the label of a document, out of one or two of its named fields."""

    name: Literal["labels"]
    """The objective."""
    fields: tuple[str, ...] = ()
    """The fields that are read, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], the second as segment 1;
    none: all that the corpus has; a corpus without fields: the whole document."""

    document_boundaries: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("roformer",)
    packings: ClassVar[tuple[Packing, ...]] = ("best_fit", "documents")

    def problems(self) -> list[str]:
        """More fields than there are segments; one twice."""
        if len(self.fields) > 2 or len(set(self.fields)) < len(self.fields):
            return [
                f"fields: names {', '.join(self.fields)}; must be one or two, not the same (须不同)"
            ]
        return []


Objective = Causal | Masked | PseudoSummary | SpanCorruption | Prefix | Pairs | Labels
SEQ2SEQ = (PseudoSummary, SpanCorruption, Prefix, Pairs)
"""Those with an encoder and a decoder."""


def head_problems(objective: Objective, labels: int) -> list[str]:
    """A head over words for labels, or the other way round."""
    if isinstance(objective, Labels) == bool(labels):
        return []
    must = "the number of labels of the corpus" if isinstance(objective, Labels) else "0"
    return [f"labels: is {labels}, objective.name={objective.name} needs {must} (输出头与目标不符)"]


def packing_of(objective: Objective, packing: Packing | None) -> Packing:
    """How rows are laid out: as asked, or as is usual for the objective."""
    return packing or objective.packings[0]


def data_problems(
    objective: Objective, packing: Packing | None, seq_len: int, target_len: int | None
) -> list[str]:
    """What of the `data` section does not fit the objective."""
    found = []
    name = objective.name
    if packing is not None and packing not in objective.packings:
        found.append(
            f"data.packing: is {packing}, objective.name={name} needs one of "
            f"{', '.join(objective.packings)} (该目标不支持此排布)"
        )
    if not objective.document_boundaries and packing not in (None, "windows"):
        found.append(
            f"data.packing: is {packing}, objective.document_boundaries=false reads the stream in "
            "windows; leave one of them out (二者冲突)"
        )
    if not isinstance(objective, SEQ2SEQ):
        if target_len is not None:
            found.append(
                f"data.target_len: is {target_len}, objective.name={name} has no target of its "
                "own; leave it out (该目标没有解码器)"
            )
        return found
    if target_len is None:
        found.append(
            f"data.target_len: must be given for objective.name={name}: the tokens of a decoder's "
            "row (须给出解码器行长)"
        )
    elif isinstance(objective, PseudoSummary | Pairs):
        for key, row, longest in (
            ("seq_len", seq_len, objective.source_tokens),
            ("target_len", target_len, objective.target_tokens),
        ):
            if longest > row:
                side = "source" if key == "seq_len" else "target"
                found.append(
                    f"data.{key}: is {row}, objective.{side}_tokens={longest} must fit in it; "
                    "raise the one or lower the other (行长不足)"
                )
    return found


def _share(key: str, value: float) -> list[str]:
    return [] if 0 < value < 1 else [f"{key}: is {value}, must lie between 0 and 1"]


def _lengths(source: int, target: int) -> list[str]:
    return [
        f"{key}: is {value}, must be at least 3: a token between [CLS] and [SEP]"
        for key, value in (("source_tokens", source), ("target_tokens", target))
        if value < 3
    ]
