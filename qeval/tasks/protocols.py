"""Named ways to make token rows, so that numbers can be laid beside published ones; and windows of one's own.

The name fixes the window, the stride, which positions are scored and where BOS goes. Where BOS goes matters: a model
that was trained with it in front of every sequence does worse without it. Windows of one's own put it in front of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qeval.errors import UsageError, unknown
from qeval.tasks.conventions import CONVENTIONS, DEFAULT_CONVENTION, Convention
from qeval.tasks.windows import BosPlacement, Scoring, Windows, make_windows


@dataclass(frozen=True)
class Protocol:
    """What fixes the token rows of a run: the corpus, the windows over it, what of them is scored, and BOS."""

    name: str
    corpus: str
    window: int
    stride: int
    scoring: Scoring
    bos_placement: BosPlacement
    description: str
    source: str
    convention: str = DEFAULT_CONVENTION

    def windows(self, ids: Sequence[int], *, bos: int | None, max_windows: int | None = None) -> Windows:
        """The windows of a text's token ids under this protocol; `bos` is None for none."""
        return make_windows(
            ids,
            self.window,
            self.stride,
            scoring=self.scoring,
            bos=bos,
            bos_placement=self.bos_placement,
            max_windows=max_windows,
        )


DEFAULT = "pydoc-1024"

_TABLE = (
    Protocol(
        name="pydoc-1024",
        corpus="pydoc",
        window=1024,
        stride=1024,
        scoring="new",
        bos_placement="window",
        description="the Python reference that CPython ships, windows of 1024 without overlap, BOS in front of each",
        source="qeval's offline default",
    ),
    Protocol(
        name="wikitext2-1024/512",
        corpus="wikitext2",
        window=1024,
        stride=512,
        scoring="new",
        bos_placement="text",
        description="windows of 1024 with stride 512, each token but the first scored once, BOS once",
        source="Model Optimizer's perplexity; Hugging Face, 'Perplexity of fixed-length models'",
        convention="hf-strided",
    ),
    Protocol(
        name="wikitext2-4096",
        corpus="wikitext2",
        window=4096,
        stride=4096,
        scoring="new",
        bos_placement="text",
        description="windows of 4096 without overlap, all positions for KL, BOS once",
        source="Model Optimizer's KL-divergence",
    ),
    Protocol(
        name="llamacpp-512",
        corpus="wikitext2",
        window=512,
        stride=512,
        scoring="second_half",
        bos_placement="replace",
        description="windows of 512 without overlap, the second half scored, BOS in place of each first token",
        source="llama.cpp's perplexity tool",
        convention="llamacpp-512-half",
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _TABLE}


def choose(
    *,
    name: str | None = None,
    corpus: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    convention: str | None = None,
    context: int | None = None,
) -> Protocol:
    """The protocol that the flags ask for: a named one, or windows of one's own, over its own corpus or another.

    A window without a stride has no overlap, save where the convention has its own; a corpus alone takes the default
    protocol's windows. `context` is the model's longest sequence: the window of a convention that names none.

    Raises:
        UsageError: a name is unknown, or comes with a window, stride or convention that it already fixes.

    >>> choose(corpus="notes/a.txt", window=512, stride=256).name
    'a-512/256'
    >>> choose(corpus="notes/a.txt", convention="gptq-2048").name
    'a-2048/2048 by gptq-2048'
    """
    if name is not None:
        return _over(_named(name, window, stride, convention), corpus)
    if convention is not None:
        return _by(_convention(convention), corpus or PROTOCOLS[DEFAULT].corpus, window, stride, context)
    if window is None and stride is None:
        return _over(PROTOCOLS[DEFAULT], corpus)
    size = PROTOCOLS[DEFAULT].window if window is None else window
    return custom(corpus or PROTOCOLS[DEFAULT].corpus, size, size if stride is None else stride)


def custom(corpus: str, window: int, stride: int) -> Protocol:
    """Windows of one's own over a corpus, with BOS in front of each."""
    overlap = "without overlap" if stride == window else f"with stride {stride}"
    return Protocol(
        name=f"{_short(corpus)}-{window}/{stride}",
        corpus=corpus,
        window=window,
        stride=stride,
        scoring="new",
        bos_placement="window",
        description=f"windows of {window} {overlap}, BOS in front of each",
        source="the command line",
    )


def _named(name: str, window: int | None, stride: int | None, convention: str | None) -> Protocol:
    if window is not None or stride is not None:
        raise UsageError(
            f"--protocol {name} fixes the window and the stride; give either --protocol or --window and --stride."
        )
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    if convention not in (None, protocol.convention):
        raise UsageError(f"--protocol {name} fixes the convention, {protocol.convention}; leave --convention out.")
    return protocol


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise unknown("convention", name, CONVENTIONS)
    return CONVENTIONS[name]


def _by(convention: Convention, corpus: str, window: int | None, stride: int | None, context: int | None) -> Protocol:
    """A convention over a corpus; a window of one's own has no overlap unless a stride is given.

    Raises:
        UsageError: a stride where the convention has no overlap, or no length where it takes the model's.
    """
    size = window or convention.window or context
    if size is None:
        raise UsageError(f"--convention {convention.name} takes windows as long as the model's context; give --window.")
    own = size if convention.stride is None else (size if window is not None else convention.stride)
    step = own if stride is None else stride
    if convention.stride is None and convention.name != DEFAULT_CONVENTION and step != size:
        raise UsageError(f"--convention {convention.name} has windows without overlap; leave --stride out.")
    text = _RAW.get(corpus, corpus) if convention.scoring == "rolling" else corpus
    return Protocol(
        name=f"{_short(text)}-{size}/{step} by {convention.name}",
        corpus=text,
        window=size,
        stride=step,
        scoring=convention.scoring,
        bos_placement=convention.bos_placement,
        description=convention.description,
        source=convention.source,
        convention=convention.name,
    )


_RAW = {"wikitext2": "wikitext2-raw"}
"""Texts whose documents lie in a file as it was, not in rows joined by blank lines."""


def _over(protocol: Protocol, corpus: str | None) -> Protocol:
    """`protocol` over another corpus; its name says so, since its numbers can't be laid beside the published ones."""
    if corpus is None or corpus == protocol.corpus:
        return protocol
    return replace(protocol, name=f"{protocol.name} over {_short(corpus)}", corpus=corpus)


def _short(corpus: str) -> str:
    """How a name refers to a corpus: a file by its stem."""
    return Path(corpus).stem
