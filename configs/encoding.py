"""Which tokenizer a corpus has, and what is stored beside its token ids."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tokenizing:
    """Which tokenizer: a published one, or one trained on the train split."""

    kind: Literal["cpm", "byte_bpe", "byte_unigram", "wordpiece"]
    """cpm: words, then sentencepiece unigram, as CPM-1; byte_bpe, byte_unigram: sentencepiece's BPE
    or unigram that falls back to bytes and gives every document back to the last character;
    wordpiece: BERT's, or, with `word`, WoBERT's, RoFormer's and T5 PEGASUS'."""
    vocab_size: int | None = None
    """Size of the vocabulary to train; goes without `model`."""
    model: str | None = None
    """A published chinese_vocab.model (cpm) or vocab.txt (wordpiece), or a tokenizer/ folder made
    here: used as it is."""
    sample_bytes: int = 20_000_000
    """Text that training sees, at most, drawn evenly over the train split. sentencepiece needs 17
    to 33 times as much memory."""
    word: bool = True
    """wordpiece: words of jieba's that the vocabulary has are one token; false: characters."""
    base_vocab: str | None = None
    """wordpiece, trained: the vocab.txt to choose from, such as bert-base-chinese's, whose control
    tokens are kept; null: the characters of the text."""
    dictionary_words: int = 200_000
    """wordpiece, trained, with `word`: so many words of jieba's dictionary, the commonest, stand
    for choice beside `base_vocab` (T5 PEGASUS: 200,000)."""
    user_dictionary: str | None = None
    """Words of your own on top of jieba's, a `word [frequency [tag]]` a line as jieba's
    load_userdict reads it; without a frequency the word comes out whole. Goes with a model too;
    kept with the tokenizer, whose fingerprint covers it (用户词典)."""

    def problems(self) -> list[str]:
        """A model or a size, not both; a sample that fits a worker."""
        found = []
        if (self.vocab_size is None) == (self.model is None):
            found.append(
                "vocab_size, model: give exactly one, a size to train or a model (二者择一)"
            )
        if self.vocab_size is not None and not 256 <= self.vocab_size <= 1_000_000:
            found.append(f"vocab_size: is {self.vocab_size}, must lie in [256, 1000000]")
        if not 1_000 <= self.sample_bytes <= 100_000_000:
            found.append(
                f"sample_bytes: is {self.sample_bytes}, must lie in [1000, 100000000]:"
                " sentencepiece needs 17 to 33 times its input in memory"
            )
        if self.base_vocab is not None and (self.kind != "wordpiece" or self.model is not None):
            found.append(
                f"base_vocab: is '{self.base_vocab}', goes with kind: wordpiece, without a model"
                " (仅用于构建 wordpiece 词表)"
            )
        if self.dictionary_words < 0:
            found.append(f"dictionary_words: is {self.dictionary_words}, must not be negative")
        return found


@dataclass(frozen=True)
class Encoding:
    """What is stored beside the token ids."""

    boundaries: bool = True
    """Where words and sentences begin, a byte for each token, in train.marks and valid.marks: what
    whole-word masks and spans of words are drawn from. Costs a tenth of encoding with cpm, where
    words are cut anyway, half of it with wordpiece; the kinds that do without words (byte_bpe,
    wordpiece with word: false) take two to three times as long (词界、句界)."""
    pseudo_summary: bool | Literal["lcs", "rouge1"] = False
    """Sentences, units of 768 characters and their gap sentences, in train.gaps and valid.gaps.
    lcs (or true): as T5 PEGASUS picks them, one by one by their longest common subsequence with the
    rest; rouge1: PEGASUS' Ind-Orig, three in ten by the F1 of their characters with the rest. Not
    for a document where a token lies across the border of two sentences: with cpm and wordpiece
    hardly any, with byte_bpe about a quarter; nor for documents with named fields (伪摘要)."""

    @property
    def criterion(self) -> str | None:
        """How gap sentences are picked; None without them."""
        return "lcs" if self.pseudo_summary is True else self.pseudo_summary or None
