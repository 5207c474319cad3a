"""Columns of a file of lm-eval's samples. Multiple choice is read by Arrow, several times as fast as line by line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from qeval.errors import UsageError
from qeval.imports.foreign_rows import HASHES, TextArray
from qeval.stats.bootstrap import Floats, Ints

_KEYS = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", *HASHES,
}  # fmt: skip
"""The keys of a sample beside its metrics."""
_BLOCK_BYTES = 1 << 24
"""A line may be as long as this."""
_MUTUAL = "acc_mutual_info"
"""Metric for which every choice is scored a second time without its context, after all others."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one filter: `items`, `targets`, every metric's values, and of choices the log-likelihoods.

    `values` are [items] each; `loglikelihoods` (nats) are those of all items' choices one after the other, `counts`
    [items] how many each has. `lines` are the samples as they stand in the file, where they were read one by one.
    """

    filter: str
    items: TextArray
    targets: Sequence[str]
    metrics: Sequence[str]
    values: Mapping[str, Sequence[Any]]
    hashes: Mapping[str, TextArray]
    loglikelihoods: Floats | None
    counts: Ints | None
    path: Path

    def continuations(self) -> list[list[str]] | None:
        """Return the text of each choice; None where the file does not hold them."""
        texts: list[list[str]] = []
        for line in _lines(self.path):
            if str(line.get("filter", "none")) == self.filter:
                arguments = line.get("arguments")
                if not isinstance(arguments, dict):
                    return None
                texts.append([str(each.get("arg_1", "")) for each in arguments.values()])
        return texts if len(texts) == len(self.items) else None


def read_samples(path: Path) -> list[Samples]:
    """Return the samples of a file, by filter.

    Raises:
        UsageError: It can't be read, a line is no sample of lm-eval's, or it holds none.
    """
    first = next(_lines(path), None)
    if first is None:
        raise UsageError(f"{path} holds no sample.")
    return _read_choices(path, first) or _read_lines(path)


def _lines(path: Path) -> Any:
    """Yield the lines of a file as objects."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                line = json.loads(text)
                if not isinstance(line, dict) or "doc_id" not in line or "filtered_resps" not in line:
                    raise UsageError(f"{path}, line {number}, is no sample of lm-eval's: it has no doc_id and answers.")
                yield line
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except ValueError as error:
        raise UsageError(f"{path}, line {number}, is torn: {error}.") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _metrics_of(line: Mapping[str, Any]) -> list[str]:
    listed = line.get("metrics")
    return [str(name) for name in listed] if isinstance(listed, list) else [name for name in line if name not in _KEYS]


def _is_choice(line: Mapping[str, Any]) -> bool:
    """Return whether a sample's answers are pairs of a log-likelihood and whether it is greedy, of several choices."""
    answers = line["filtered_resps"]
    return (
        isinstance(answers, list)
        and len(answers) > 1
        and all(isinstance(each, list) and len(each) == 2 for each in answers)
        and "acc" in _metrics_of(line)
    )


def _read_choices(path: Path, first: Mapping[str, Any]) -> list[Samples]:
    """Return the samples of multiple choice in the form of lm-eval's files; nothing where they are of another form."""
    metrics = _metrics_of(first)
    plain = [name for name in metrics if isinstance(first.get(name), int | float)]
    if not _is_choice(first) or plain != metrics or any(name not in first for name in HASHES):
        return []
    text, number = pa.string(), pa.float64()
    fields = [("doc_id", pa.int64()), ("filter", text), ("target", text), *((name, text) for name in HASHES)]
    fields += [("filtered_resps", pa.list_(pa.list_(text))), *((name, number) for name in metrics)]
    options = pj.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    try:
        table = pj.read_json(path, pj.ReadOptions(block_size=_BLOCK_BYTES), options).combine_chunks()
        return [
            _of_table(table.filter(pc.equal(table["filter"], name)), metrics, name, path)
            for name in pc.unique(table["filter"]).to_pylist()
        ]
    except (pa.ArrowException, ValueError):
        return []  # numbers where text is expected, or other lines than the first: they are read one by one


def _of_table(table: pa.Table, metrics: Sequence[str], name: str, path: Path) -> Samples:
    answers = table["filtered_resps"].combine_chunks()
    pairs = answers.flatten()
    if table.num_rows != len(answers) or set(pc.unique(pc.list_value_length(pairs)).to_pylist()) != {2}:
        raise ValueError("answers are no pairs")
    counts = np.asarray(pc.list_value_length(answers).to_pylist(), np.int64)
    numbers = pc.cast(pc.list_element(pairs, 0), pa.float64()).to_numpy(zero_copy_only=False)
    counts, numbers = _without_mutual(metrics, counts, numbers)
    return Samples(
        filter=name,
        items=np.asarray(pc.cast(table["doc_id"], pa.string()).to_pylist(), np.object_),
        targets=table["target"].to_pylist(),
        metrics=metrics,
        values={metric: table[metric].to_pylist() for metric in metrics},
        hashes={each: np.asarray(table[each].to_pylist(), np.object_) for each in HASHES},
        loglikelihoods=numbers,
        counts=counts,
        path=path,
    )


def _read_lines(path: Path) -> list[Samples]:
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for line in _lines(path):
        by_filter.setdefault(str(line.get("filter", "none")), []).append(line)
    return [_of_lines(lines, name, path) for name, lines in by_filter.items()]


def _of_lines(lines: Sequence[Mapping[str, Any]], name: str, path: Path) -> Samples:
    metrics = list(dict.fromkeys(metric for line in lines for metric in _metrics_of(line)))
    loglikelihoods = counts = None
    if all(_is_choice(line) for line in lines):
        counts = np.asarray([len(line["filtered_resps"]) for line in lines], np.int64)
        numbers = np.asarray([float(pair[0]) for line in lines for pair in line["filtered_resps"]], np.float64)
        counts, loglikelihoods = _without_mutual(metrics, counts, numbers)
    known = [each for each in HASHES if all(each in line for line in lines)]
    return Samples(
        filter=name,
        items=np.asarray([str(line["doc_id"]) for line in lines], np.object_),
        targets=[str(line.get("target", "")) for line in lines],
        metrics=metrics,
        values={metric: [line.get(metric) for line in lines] for metric in metrics},
        hashes={each: np.asarray([str(line[each]) for line in lines], np.object_) for each in known},
        loglikelihoods=loglikelihoods,
        counts=counts,
        path=path,
    )


def _without_mutual(metrics: Sequence[str], counts: Ints, numbers: Floats) -> tuple[Ints, Floats]:
    """Return the choices' own log-likelihoods, without those that mutual information adds after them."""
    if _MUTUAL not in metrics:
        return counts, numbers
    half = counts // 2
    places = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return half, numbers[places < np.repeat(half, counts)]
