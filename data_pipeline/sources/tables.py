"""Documents from rows: the doors to `datasets` and to pyarrow.

    parquet    a part is some row groups; rows are read a batch at a time
    datasets   a part is a range of rows of a dataset that lies on the disk

A row that cannot be used is a fault with its number. A row group that is damaged is one fault that
counts the rows that are lost, and the next group is read. A file system that fails is no damage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from configs.sources import Source
from data_pipeline.shards import CorpusError
from data_pipeline.sources.documents import (
    Document,
    Fault,
    Faults,
    Meter,
    Part,
    Unusable,
    document,
    readable,
)
from data_pipeline.sources.places import places

ROWS = 1000


def _rows(
    source: Source, columns: dict[str, list[Any]], first: int, part: Part, faults: Faults
) -> Iterator[Document]:
    """Documents of rows given as columns; `first` is the number of the first row."""
    for row, values in enumerate(zip(*columns.values(), strict=True), first):
        record = dict(zip(columns, values, strict=True))
        try:
            _all_text(record)
            place = f"{part.name}:{row}" if source.kind == "parquet" else str(row)
            yield document(source, record, place)
        except Unusable as bad:
            path = readable(part.path)
            where = f"source '{source.name}', {path}" if source.kind == "datasets" else path
            sentence = f"{where}, row {row}: the row {bad.what} (此行无法使用)"
            faults(Fault(bad.kind, path, f"row {row}", sentence, repr(record)[:2000]))


def _all_text(record: dict[str, Any]) -> None:
    """Unusable for a row with a value that _values() could not read; its bytes are shown."""
    for column, value in record.items():
        if isinstance(value, UnicodeDecodeError):
            record[column] = value.object
            byte = value.object[value.start]
            what = f"has in its column '{column}' what is no UTF-8 (the byte is 0x{byte:02x})"
            raise Unusable("encoding", f"{what}; mend it, or take the row out")


def _known(source: Source, names: list[str], what: str) -> None:
    """CorpusError if a table has no such columns: no row of it could be used."""
    key = "fields" if source.fields else "text_field"
    asked = [column for _, column in source.columns] or [source.text_field]
    wanted = [(column, key) for column in asked]
    wanted += [(source.label_field, "label_field")] if source.label_field else []
    for column, key in wanted:
        if column not in names:
            raise CorpusError(
                f"source '{source.name}': {what} has no column '{column}', it has "
                f"{', '.join(names)}; set its {key} (没有这一列)"
            )


# ---- parquet


def row_groups(path: Path) -> tuple[int, int, int]:
    """(row groups, bytes of text in them, about, rows); zeros for a damaged file. CorpusError if
    it cannot be opened."""
    import pyarrow.parquet as parquet

    try:
        about = parquet.read_metadata(str(path))
    except Exception as error:  # whatever is damaged is said when it is read
        if _of_the_system(error):
            raise CorpusError(f"{path} cannot be read: {error.strerror} (无法读取)") from None
        return 0, 0, 0
    sizes = [about.row_group(n).total_byte_size for n in range(about.num_row_groups)]
    return len(sizes), sum(sizes), about.num_rows


def read_parquet(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of a part's row groups."""
    import pyarrow.parquet as parquet

    def damaged(place: str, error: Exception, rows: int = 1) -> None:
        reason = " ".join(str(error).split())[:200]
        path = readable(part.path)
        sentence = f"{path}, {place}, is damaged ({reason}); fetch it again (文件损坏)"
        faults(Fault("damaged", path, place, sentence, "", rows))

    try:
        file = parquet.ParquetFile(part.path)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others
        if _of_the_system(error):
            raise
        damaged("its footer", error)
        return
    with file:
        names = [field.name for field in file.schema_arrow if _is_wanted(source, field)]
        _known(source, file.schema_arrow.names, part.path)
        about = file.metadata
        first, last = (about.num_row_groups * n // part.of for n in (part.number, part.number + 1))
        for group in range(first, last):
            row = sum(about.row_group(before).num_rows for before in range(group))
            end = row + about.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=names):
                    columns = {name: _values(batch.column(name)) for name in names}
                    yield from _rows(source, columns, row, part, faults)
                    row += batch.num_rows
            except CorpusError:
                raise
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                if _of_the_system(error):
                    raise
                lost = max(end - row, 1)
                damaged(f"row group {group} from its row {row} on, {lost} rows", error, lost)
            meter.share = (group + 1 - first) / (last - first)


def _values(column: Any) -> list[Any]:
    """The values of a column; in the place of one that is no UTF-8 the error: its row alone cannot
    be used."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _of_the_system(error: Exception) -> TypeGuard[OSError]:
    """Whether a file could not be opened or read; damaged data is an OSError without a number."""
    return isinstance(error, OSError) and error.errno is not None


def _is_wanted(source: Source, field: Any) -> bool:
    """Columns that are asked for, and plain ones, which are kept beside the text."""
    import pyarrow

    asked = {column for _, column in source.columns} or {source.text_field}
    kinds = pyarrow.types
    plain = (
        kinds.is_string(field.type)
        or kinds.is_large_string(field.type)
        or kinds.is_integer(field.type)
        or kinds.is_floating(field.type)
        or kinds.is_boolean(field.type)
        or kinds.is_dictionary(field.type)
    )
    return field.name in asked or plain


# ---- datasets


def read_dataset(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of a range of rows."""
    rows = dataset(source)
    _known(source, rows.column_names, "the dataset")
    names = [field.name for field in rows.features.arrow_schema if _is_wanted(source, field)]
    table = rows.with_format("arrow", columns=names)
    first, last = (len(rows) * n // part.of for n in (part.number, part.number + 1))
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        batch = table[start:stop]
        columns = {name: _values(batch.column(name)) for name in names}
        yield from _rows(source, columns, start, part, faults)
        meter.share = (stop - first) / (last - first)


def dataset(source: Source) -> Any:
    """A saved dataset from its folder, else by its name from the Hub or the Hub's local cache.
    CorpusError if there is none."""
    import datasets  # takes a second, and most corpora are files

    datasets.disable_progress_bars()
    name = source.paths[0]
    try:
        for folder in places(name):
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                rows = datasets.load_from_disk(str(folder))
                break
        else:
            rows = datasets.load_dataset(name, source.subset, split=source.split)
    except Exception as error:  # the library raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"source '{source.name}': the dataset '{name}' cannot be loaded ({reason}); without a "
            "network give the folder of a saved dataset as its path (数据集无法加载)"
        ) from None
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise CorpusError(
                f"source '{source.name}': the dataset has no split '{source.split}', it has "
                f"{', '.join(rows)}; set its split (没有这一部分)"
            )
        rows = rows[source.split]
    return rows
