"""Perplexity by its names: which windows a text is cut into, and what is made of their log-likelihoods.

The same model has another perplexity under each of them (Llama-3-8B on WikiText-2: 6.23, 6.14 and 5.54 under
llama.cpp's windows and GPTQ's of 2048 and 8192), so no figure stands without its convention's name. What the rows
hold is the same under all; the reductions differ:

| reduction | what it is |
|---|---|
| `tokens` | exp of the mean NLL over all scored tokens: sums of NLLs over their count, never a mean of means |
| `guide` | the mean over windows, each weighted by its labels less one, as the Hugging Face guide's loop counts them |
| `windows` | the mean over windows, each counted alike; the code multiplies a mean over 2047 labels by 2048 |
| `words` | the sum of all NLLs over the words (bytes) of the text before it was detokenized |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qeval.tasks.windows import BosPlacement, Scoring

Reduction = Literal["tokens", "guide", "windows", "words"]


@dataclass(frozen=True)
class Convention:
    """Windows (`window` None: the model's context; `stride` None: no overlap) and a reduction, under a name."""

    name: str
    window: int | None
    stride: int | None
    scoring: Scoring
    bos_placement: BosPlacement
    reduction: Reduction
    description: str
    source: str


DEFAULT_CONVENTION = "token-mean"

_TABLE = (
    Convention(
        name=DEFAULT_CONVENTION,
        window=1024,
        stride=None,
        scoring="new",
        bos_placement="window",
        reduction="tokens",
        description="every scored token alike, BOS in front of each window",
        source="qeval's default",
    ),
    Convention(
        name="hf-strided",
        window=1024,
        stride=512,
        scoring="new",
        bos_placement="text",
        reduction="guide",
        description="windows of 1024 with stride 512, weighted by their labels less one, BOS once",
        source="Hugging Face, 'Perplexity of fixed-length models'",
    ),
    Convention(
        name="gptq-2048",
        window=2048,
        stride=None,
        scoring="new",
        bos_placement="text",
        reduction="windows",
        description="windows of 2048 without overlap, the mean of their means over 2047 labels, BOS once",
        source="GPTQ's evaluation (arXiv 2210.17323), and AWQ's after it",
    ),
    Convention(
        name="llamacpp-512-half",
        window=512,
        stride=None,
        scoring="second_half",
        bos_placement="replace",
        reduction="tokens",
        description="windows of 512 without overlap, the second half scored, BOS in place of each first token",
        source="llama.cpp's perplexity tool",
    ),
    Convention(
        name="lm-eval-word",
        window=None,
        stride=None,
        scoring="rolling",
        bos_placement="document",
        reduction="words",
        description="each page detokenized and scored whole, per word and per byte of the page as it was",
        source="lm-evaluation-harness, task wikitext",
    ),
)
CONVENTIONS: Mapping[str, Convention] = {convention.name: convention for convention in _TABLE}
