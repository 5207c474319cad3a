"""A text's documents as lm-evaluation-harness's task `wikitext` makes them: pages, detokenized by its own function.

A page begins at a line such as ` = Title = `; what stands before the first is a page too, unless it is blank. Words and
bytes are counted on the page as it was, before it was detokenized.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qeval.errors import UsageError
from qeval.tasks.corpus import encode
from qeval.tasks.windows import Windows, rolling_windows


@dataclass(frozen=True)
class CountedWindows:
    """Windows, and the words and bytes of the pages that they score."""

    windows: Windows
    words: int
    bytes: int


def pages(text: str) -> Iterator[str]:
    r"""Yield the pages of a text in WikiText's raw layout; a text without headings is one page.

    >>> list(pages(" \n = A = \n one \n = = B = = \n two \n = C = \n three"))
    [' = A = \n one \n = = B = = \n two ', ' = C = \n three']
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_title(line) and lines:
            yield from _unless_blank(lines)
            lines = []
        lines.append(line)
    yield from _unless_blank(lines)


def rolling(tokenizer: Any, text: str, window: int, max_windows: int | None = None) -> CountedWindows:
    """Cut the pages of a text into rolling windows, each page behind one BOS; EOS where there is none, as the harness.

    Args:
        tokenizer: The model's.
        text: In WikiText's raw layout.
        window: Tokens of a window.
        max_windows: Take as many pages as fit whole into so many windows.

    Raises:
        UsageError: The tokenizer has neither token, or `max_windows` holds no whole page.
    """
    # the harness is slow to import, and only its task's own page of code is wanted
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer  # noqa: PLC0415

    documents = list(pages(text))
    ids = [encode(tokenizer, wikitext_detokenizer({"page": page})) for page in documents]
    windows = rolling_windows(ids, window, prefix=prefix_token(tokenizer), max_windows=max_windows)

    # words and bytes of the pages as they were, by the harness's own count
    counts = [process_results({"page": page}, (0.0,)) for page in documents[: windows.documents]]
    return CountedWindows(
        windows,
        sum(count["word_perplexity"][1] for count in counts),
        sum(count["byte_perplexity"][1] for count in counts),
    )


def prefix_token(tokenizer: Any) -> int:
    """Return the id that lm-evaluation-harness puts before a document: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError(
        "--convention lm-eval-word needs a token before each page; this tokenizer has neither BOS nor EOS."
    )


def _is_title(line: str) -> bool:
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


def _unless_blank(lines: list[str]) -> Iterator[str]:
    page = "\n".join(lines)
    if page.strip():
        yield page
