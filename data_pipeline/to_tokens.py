"""The last stages of a build: kept documents -> a tokenizer -> ids and what lies beside them.

documents --MakeTokenizer--> tokenizer/ --Encode--> .bin .idx .marks .fields --FindGaps--> .gaps
"""

from collections.abc import Callable, Sequence

from configs.corpus import CorpusConfig
from data_pipeline.blocks import Block, Stage
from data_pipeline.encode import Beside, Encode, MakeTokenizer
from data_pipeline.gaps import FindGaps


def to_tokens(
    config: CorpusConfig,
    stage: Callable[..., Stage],
    divided: Stage,
    models: Sequence[str],
    beside: Beside,
) -> list[Stage]:
    """Run them over the documents of `divided`; stage(name, blocks, tasks, inputs, bytes) runs one.
    `models` are the fingerprints of the files that the page's tokenizer names. Returns the
    tokenizer's stage, the ids', and, if asked for, the gap sentences'."""
    documents, counts = divided.data / "documents", divided.counts
    shards = sorted(documents.glob("train-*.jsonl.zst"))
    learn = MakeTokenizer(config.tokenizer, shards, counts["train_bytes"])
    # A published model needs no text; a trained one does, whatever dictionary stands beside it.
    learnt = [] if config.tokenizer.model is not None else [divided.key]
    made = stage("tokenizer", [learn], 1, [*learnt, *models], learn.train_bytes)
    words = made.data / "tokenizer"
    through: list[Block] = [Encode(documents, words, beside)]
    size = counts["train_bytes"] + counts["valid_bytes"]
    encoded = stage("encode", through, divided.tasks, [divided.key, made.key], size)
    if (criterion := config.encode.criterion) is None:
        return [made, encoded]
    find: list[Block] = [FindGaps(documents, encoded.data, words, criterion)]
    inputs = [divided.key, encoded.key]
    return [made, encoded, stage("gaps", find, divided.tasks, inputs, size)]
