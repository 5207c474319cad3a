"""Protocols of the token rows: a protocol is a corpus, windows over it, and a convention of perplexity.

The same model has another perplexity under each convention (Llama-3-8B on WikiText-2: 6.23, 6.14 and 5.54 under
llama.cpp's windows and GPTQ's of 2048 and 8192), so no figure stands without its convention's name. A convention says
which positions are scored, where BOS goes, and what is made of the log-likelihoods. What the rows hold is the same
under all; the reductions differ:

| reduction | what it is |
|---|---|
| `tokens` | exp of the mean NLL over all scored tokens: sums of NLLs over their count, never a mean of means |
| `guide` | the mean over windows, each weighted by its labels less one, as the Hugging Face guide's loop counts them |
| `windows` | the mean over windows, each counted alike; the code multiplies a mean over 2047 labels by 2048 |
| `words` | the sum of all NLLs over the words (bytes) of the text before it was detokenized |

Where BOS goes matters: a model that was trained with it in front of every sequence does worse without it. Windows that
the user sizes have it in front of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qeval.errors import UsageError, unknown
from qeval.tasks.windows import BosPlacement, Scoring, Windows, make_windows

Reduction = Literal["tokens", "guide", "windows", "words"]


@dataclass(frozen=True)
class Convention:
    """The way in which a perplexity is counted, over any corpus.

    Attributes:
        name: What `--convention` takes, and what stands beside every figure.
        window: Tokens of a window; None for the model's context.
        stride: Tokens between the starts of two windows; None for no overlap.
        scoring: Which positions of a window are scored.
        bos_placement: Where BOS goes.
        reduction: What is made of the log-likelihoods.
        description: Its line in `qeval tasks`.
        source: Whose convention it is.
    """

    name: str
    window: int | None
    stride: int | None
    scoring: Scoring
    bos_placement: BosPlacement
    reduction: Reduction
    description: str
    source: str


@dataclass(frozen=True)
class Protocol:
    """The settings that fix the token rows of a run: the corpus, the windows over it, and the convention.

    `window` and `stride` are in tokens; without overlap they are equal.
    """

    name: str
    corpus: str
    window: int
    stride: int
    convention: Convention
    description: str
    source: str

    def windows(self, ids: Sequence[int], *, bos: int | None, max_windows: int | None = None) -> Windows:
        """Return the windows of a text under this protocol.

        Args:
            ids: The token ids of the text, without special tokens.
            bos: The id of the BOS token; None for none.
            max_windows: Take the first so many.
        """
        return make_windows(
            ids,
            self.window,
            self.stride,
            scoring=self.convention.scoring,
            bos=bos,
            bos_placement=self.convention.bos_placement,
            max_windows=max_windows,
        )


TOKEN_MEAN = Convention(
    name="token-mean",
    window=1024,
    stride=None,
    scoring="new",
    bos_placement="window",
    reduction="tokens",
    description="every scored token alike, BOS in front of each window",
    source="qeval's default",
)
DEFAULT_CONVENTION = TOKEN_MEAN.name
_CONVENTIONS = (
    TOKEN_MEAN,
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
CONVENTIONS: Mapping[str, Convention] = {convention.name: convention for convention in _CONVENTIONS}

DEFAULT = "pydoc-1024"
_PROTOCOLS = (
    Protocol(
        name=DEFAULT,
        corpus="pydoc",
        window=1024,
        stride=1024,
        convention=TOKEN_MEAN,
        description="the Python reference that CPython ships, windows of 1024 without overlap, BOS in front of each",
        source="qeval's offline default",
    ),
    Protocol(
        name="wikitext2-1024/512",
        corpus="wikitext2",
        window=1024,
        stride=512,
        convention=CONVENTIONS["hf-strided"],
        description="windows of 1024 with stride 512, each token but the first scored once, BOS once",
        source="Model Optimizer's perplexity; Hugging Face, 'Perplexity of fixed-length models'",
    ),
    Protocol(
        name="wikitext2-4096",
        corpus="wikitext2",
        window=4096,
        stride=4096,
        convention=replace(TOKEN_MEAN, bos_placement="text"),
        description="windows of 4096 without overlap, all positions for KL, BOS once",
        source="Model Optimizer's KL-divergence",
    ),
    Protocol(
        name="llamacpp-512",
        corpus="wikitext2",
        window=512,
        stride=512,
        convention=CONVENTIONS["llamacpp-512-half"],
        description="windows of 512 without overlap, the second half scored, BOS in place of each first token",
        source="llama.cpp's perplexity tool",
    ),
)
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}
_RAW = {"wikitext2": "wikitext2-raw"}
"""Texts whose documents lie in a file as it was, not in rows joined by blank lines."""


def choose_protocol(
    *,
    name: str | None = None,
    corpus: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    convention: str | None = None,
    context: int | None = None,
) -> Protocol:
    """Return the protocol that the flags ask for.

    Args:
        name: A protocol; it fixes the window, the stride and the convention.
        corpus: Another text than the protocol's, or than the default one's.
        window: Tokens of a window.
        stride: Tokens between the starts of two windows; by default the convention's, else no overlap.
        convention: A convention of perplexity.
        context: The model's longest sequence: the window of a convention that has none.

    Raises:
        UsageError: A name is unknown, or comes with a window, stride or convention that it fixes.

    >>> choose_protocol(corpus="notes/a.txt", window=512, stride=256).name
    'a-512/256'
    >>> choose_protocol(corpus="notes/a.txt", convention="gptq-2048").name
    'a-2048/2048 by gptq-2048'
    """
    if name is not None:
        return _over(_fixed(name, window, stride, convention), corpus)
    default = PROTOCOLS[DEFAULT]
    if convention is not None:
        if convention not in CONVENTIONS:
            raise unknown("convention", convention, CONVENTIONS)
        return _by(CONVENTIONS[convention], corpus or default.corpus, window, stride, context)
    if window is None and stride is None:
        return _over(default, corpus)
    size = default.window if window is None else window
    return custom(corpus or default.corpus, size, size if stride is None else stride)


def custom(corpus: str, window: int, stride: int) -> Protocol:
    """Return the protocol of windows that the user sizes, in tokens, with BOS in front of each."""
    overlap = "without overlap" if stride == window else f"with stride {stride}"
    return Protocol(
        name=f"{_short(corpus)}-{window}/{stride}",
        corpus=corpus,
        window=window,
        stride=stride,
        convention=TOKEN_MEAN,
        description=f"windows of {window} {overlap}, BOS in front of each",
        source="the command line",
    )


def _fixed(name: str, window: int | None, stride: int | None, convention: str | None) -> Protocol:
    """Return the protocol of a name, which takes no other window, stride or convention."""
    if window is not None or stride is not None:
        raise UsageError(
            f"--protocol {name} fixes the window and the stride; give either --protocol or --window and --stride."
        )
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    if convention not in (None, protocol.convention.name):
        raise UsageError(f"--protocol {name} fixes the convention, {protocol.convention.name}; leave --convention out.")
    return protocol


def _by(convention: Convention, corpus: str, window: int | None, stride: int | None, context: int | None) -> Protocol:
    """Return a convention over a corpus; a window of the user's has no overlap unless a stride is given.

    Raises:
        UsageError: A stride where the convention has no overlap, or no length where it takes the model's.
    """
    size = window or convention.window or context
    if size is None:
        raise UsageError(f"--convention {convention.name} takes windows as long as the model's context; give --window.")

    # the convention's stride goes with its window, not with another one
    default = size if convention.stride is None or window is not None else convention.stride
    step = default if stride is None else stride
    if convention.stride is None and convention is not TOKEN_MEAN and step != size:
        raise UsageError(f"--convention {convention.name} has windows without overlap; leave --stride out.")

    text = _RAW.get(corpus, corpus) if convention.scoring == "rolling" else corpus
    return Protocol(
        name=f"{_short(text)}-{size}/{step} by {convention.name}",
        corpus=text,
        window=size,
        stride=step,
        convention=convention,
        description=convention.description,
        source=convention.source,
    )


def _over(protocol: Protocol, corpus: str | None) -> Protocol:
    """Return a protocol over another corpus; its name says so, since its numbers are not the published ones'."""
    if corpus is None or corpus == protocol.corpus:
        return protocol
    return replace(protocol, name=f"{protocol.name} over {_short(corpus)}", corpus=corpus)


def _short(corpus: str) -> str:
    """Return how a name refers to a corpus: a file by its stem."""
    return Path(corpus).stem
