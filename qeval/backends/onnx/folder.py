"""An ONNX folder opened on a provider to be scored, whoever made it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qeval.backends.onnx.decoder import Decoder, read_decoder
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.providers import Assignment, Provider, open_session, recorded_assignment
from qeval.backends.onnx.session import OrtSession
from qeval.backends.onnx.settings import onnx_rope_limit, place_of, session_entries
from qeval.backends.onnx.values import DeviceValues
from qeval.errors import UsageError
from qeval.models.device import free_bytes, release_cached

_SESSION_SHARE = 0.8
"""The part of a GPU's free memory that a session may take; torch sweeps logits in the rest."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A session on a folder, and which provider got which nodes of it."""

    session: OrtSession
    assignment: Assignment
    decoder: Decoder


@contextmanager
def opened(folder: Path, provider: Provider, *, threads: int, device_id: int = 0) -> Iterator[Opened]:
    """Open the folder's model on `provider`; its memory is let go when the block ends.

    Raises:
        UsageError: the folder or the graph can't be used.
        QevalError: ONNX Runtime refuses it, or nodes fell back to another provider.
    """
    facts = inspect_folder(folder, needs_tokenizer=False)
    if facts.context_length is None:
        raise UsageError(f"{facts.files.config} names no context length, so nothing can be scored safely.")
    decoder = read_decoder(facts)
    entries = session_entries(facts)
    limit = _memory_limit(provider, device_id)
    body = open_session(
        decoder.body, provider, threads=threads, entries=entries, device_id=device_id, memory_limit=limit
    )
    head = open_session(decoder.head, provider, threads=threads, entries=entries, device_id=device_id)
    values = DeviceValues(provider, device_id)
    session = OrtSession(decoder, body, head, values, facts.context_length, rope_limit=onnx_rope_limit(facts))
    session.find_sharing()
    assignment = _both(recorded_assignment(body), recorded_assignment(head))
    session.nodes = assignment.providers
    session.facts = [*facts.describe(), *([provider.note] if provider.note else [])]
    yield Opened(session, assignment, decoder)


def _memory_limit(provider: Provider, device_id: int) -> int | None:
    """Return the bytes of a GPU that a session may take beside torch, once torch has given back what it doesn't use."""
    kind, number = place_of(provider, device_id)
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    release_cached()
    return int(free_bytes(torch.device(kind, number)) * _SESSION_SHARE)


def _both(body: Assignment, head: Assignment) -> Assignment:
    keys = sorted({*body.counts, *head.counts})
    return Assignment({key: body.counts.get(key, 0) + head.counts.get(key, 0) for key in keys})
