"""Documents from an index made elsewhere: Megatron's .bin/.idx, its tokens back to text.

    PREFIX.idx, PREFIX.bin --> token ids of a document, without its end --tokenizer--> text

The tokenizer is a folder of ours (tokenizer.from_cpm_model makes one
of a published model). What a tokenizer cannot give back, such as the blanks of a BERT vocabulary,
is not given back.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.sources import Source
from data_pipeline.index import Index, IndexFault
from data_pipeline.shards import CorpusError
from data_pipeline.sources.documents import Document, Fault, Faults, Meter, Part
from data_pipeline.sources.places import first_place, opened


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a source. CorpusError if there is none."""
    folder = first_place(source.tokenizer or "")
    if folder is None:
        raise CorpusError(
            f"source '{source.name}': there is no tokenizer in '{source.tokenizer}'; correct its "
            "tokenizer (找不到分词器)"
        )
    return _loaded(folder)


@lru_cache(maxsize=4)
def _loaded(folder: Path) -> Any:
    from data_pipeline import tokenizer  # sentencepiece, which other sources do not need

    return tokenizer.load(folder)


def documents(path: Path) -> int:
    """How many documents an .idx has; 0 for a damaged one. CorpusError if it cannot be opened."""
    try:
        return Index(path.with_suffix("")).documents
    except IndexFault:  # whatever is damaged is said when it is read
        return 0
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror} (无法读取)") from None


def read(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of a range of an index."""
    path = Path(part.path)
    words = tokenizer_of(source)
    for file in (path, path.with_suffix(".bin")):
        opened(file).close()  # one that is gone is no damage of the data
    try:
        index = Index(path.with_suffix(""))
    except IndexFault as error:
        faults(Fault("damaged", str(path), "its tables", str(error), ""))
        return
    first, last = (index.documents * n // part.of for n in (part.number, part.number + 1))
    for number in range(first, last):
        ids = index.document(number)
        if ids.size and ids[-1] == words.eod_id:
            ids = ids[:-1]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < words.vocab_size:
            what = (
                f"has token {int(ids.max())}, the tokenizer {words.vocab_size}; it was made with "
                f"another one, correct tokenizer of source '{source.name}'"
            )
            sentence = f"{path}, document {number}: the document {what} (分词器不符)"
            faults(Fault("no_token", str(path), f"document {number}", sentence, str(ids[:100])))
            continue
        name = f"{source.name}/{part.name}:{number}"
        yield Document(name, words.decode(ids.tolist()), {"source": source.name})
        meter.share = (number + 1 - first) / (last - first)
