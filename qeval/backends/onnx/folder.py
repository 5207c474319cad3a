"""An ONNX folder opened on a provider to be scored, whoever made it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeval.backends.onnx.decoder import Decoder, read_decoder
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.packages import import_runtime
from qeval.backends.onnx.providers import Assignment, Provider, open_session, recorded_assignment
from qeval.backends.onnx.session import OrtSession
from qeval.backends.onnx.settings import place_of, rope_limit, session_entries
from qeval.errors import UsageError


@dataclass(frozen=True, eq=False)
class Opened:
    """A session on a folder, and which provider got which nodes of it."""

    session: OrtSession
    assignment: Assignment
    decoder: Decoder


@contextmanager
def opened(folder: Path, provider: Provider, *, threads: int, device_id: int = 0) -> Iterator[Opened]:
    """The folder's model on `provider`; its memory is let go when the block ends.

    Raises:
        UsageError: the folder or the graph can't be used.
        QevalError: ONNX Runtime refuses it, or nodes fell back to another provider.
    """
    facts = inspect_folder(folder, needs_tokenizer=False)
    if facts.context_length is None:
        raise UsageError(f"{facts.files.config} names no context length, so nothing can be scored safely.")
    decoder = read_decoder(facts)
    entries = session_entries(facts)
    body = open_session(decoder.body, provider, threads=threads, entries=entries, device_id=device_id)
    head = open_session(decoder.head, provider, threads=threads, entries=entries, device_id=device_id)
    place = place_of(provider, device_id)
    runtime = import_runtime()

    def value_of(array: Any) -> Any:
        return runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *place)

    session = OrtSession(decoder, body, head, value_of, facts.context_length, rope_limit=rope_limit(facts))
    session.find_sharing()
    yield Opened(session, _both(recorded_assignment(body), recorded_assignment(head)), decoder)


def _both(body: Assignment, head: Assignment) -> Assignment:
    keys = sorted({*body.counts, *head.counts})
    return Assignment({key: body.counts.get(key, 0) + head.counts.get(key, 0) for key in keys})
