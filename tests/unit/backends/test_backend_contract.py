"""What every backend owes a run, whatever is behind it: models opened and put back, one identity, one description."""

import json
from typing import Any

import pytest
import torch

from qeval.backends.base import Backend, Saved, Session
from qeval.backends.replay import ReplayBackend
from qeval.compare.loading import loaded_model
from qeval.compare.settings import BackendChoice, ModelChoice
from qeval.compare.variants import Calibration
from qeval.config import parse_method
from qeval.progress import Silent
from qeval.store.run import RuntimeRecord
from qeval.types import Request
from tests.fixtures.engines_llamacpp import STAND_IN
from tests.fixtures.tiny import save_tiny

IDS = 256
REQUEST = Request(tuple(range(5, 29)), (0, 11, 23))


class Place:
    """A tiny checkpoint, loaded, with one variant of it on disk."""

    def __init__(self, folder):
        self.model = save_tiny(folder / "model", max_position_embeddings=IDS, bos_token_id=1, eos_token_id=0)
        self.loaded, self.source, self.torch = loaded_model(ModelChoice(str(self.model)))
        workshop = self.source.workshop(lambda: Calibration((), {}), 0, Silent())
        self.variant = Saved(workshop.folder(parse_method("rtn:g32")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        for module in ("library", "backend"):
            patch.setattr(f"qeval.backends.llamacpp.{module}.MODULE", STAND_IN)
        yield Place(folder)


def streamed(place):
    return loaded_model(ModelChoice(str(place.model), stream=True))[2]


def ort(place, level=1):
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnxscript")
    from qeval.compare.onnx import ort_backends

    choice = BackendChoice(("ort",), accuracy_levels=(level,))
    return ort_backends(choice, place.loaded, place.source.description)[level]


def llama_cpp(place):
    from qeval.backends.llamacpp.backend import LlamaCppBackend

    return LlamaCppBackend(place.loaded, IDS, threads=1, device="cpu")


BACKENDS: dict[str, Any] = {
    "replay": lambda place: ReplayBackend(IDS),
    "torch": lambda place: place.torch,
    "torch-streamed": streamed,
    "ort": ort,
    "ort-acc4": lambda place: ort(place, 4),
    "llama.cpp": llama_cpp,
}
"""Makers of the backends that run a baseline and its variants."""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, place) -> Backend[Any]:
    made = BACKENDS[request.param](place)
    assert made.prepare(Silent()) is None
    return made


def logits(backend, target):
    with backend.open(target) as session:
        assert isinstance(session, Session)
        return session.logits(session.states([REQUEST])[0])


def test_it_has_a_name_and_warns_in_sentences(backend, request):
    assert request.node.callspec.params["backend"].removesuffix("-streamed") == backend.name
    assert all(warning.endswith(".") for warning in backend.warnings)


def test_its_identity_is_plain_and_the_same_whatever_was_opened(backend, place):
    for target in (None, place.variant):
        before = backend.identity(target)
        logits(backend, target)
        assert backend.identity(target) == before == json.loads(json.dumps(before))


def test_a_variant_answers_otherwise_than_the_baseline_which_is_as_it_was_afterwards(backend, place):
    before, variant = logits(backend, None), logits(backend, place.variant)
    assert before.shape == variant.shape == (len(REQUEST.positions), IDS)
    assert float((before - variant).abs().max()) > 1e-3
    assert torch.equal(logits(backend, place.variant), variant)
    assert torch.equal(logits(backend, None), before)


def test_a_model_is_closed_when_its_block_fails(backend, place):
    with pytest.raises(KeyError), backend.open(place.variant):
        raise KeyError
    assert torch.equal(logits(backend, None), logits(backend, None))


def test_kernels_of_its_own_are_described_and_torch_is_not(backend, place):
    for target in (None, place.variant):
        with backend.open(target) as session:
            found = backend.describe(session, target)
        assert (found is None) == backend.fake_quantizes
        if found is not None:
            assert isinstance(found, RuntimeRecord)
            assert found.runtime and found.provider and found.facts


def test_another_tools_folder_is_run_as_its_own_backend_runs_it(place):
    theirs = ort(place)
    from qeval.backends.onnx.backend import FolderBackend
    from qeval.backends.onnx.providers import choose_provider
    from qeval.errors import QevalError

    folder: Backend[Any] = FolderBackend(choose_provider("cpu"), 1, ids=IDS)
    target = Saved(theirs.exporter.float_folder())
    assert torch.equal(logits(folder, target), logits(theirs, None))
    with folder.open(target) as session:
        assert folder.describe(session, target).exporter is None
    with pytest.raises(QevalError, match="no variant can be put into it"):
        logits(folder, None)
