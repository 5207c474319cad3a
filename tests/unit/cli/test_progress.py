"""Bars that are true: what making a variant tells its progress sums up to what was announced, experts and all."""

from contextlib import closing, contextmanager

import pytest
import torch

from qeval.backends.stream.backend import StreamBackend
from qeval.compare.loading import source_of_model
from qeval.compare.settings import ModelChoice
from qeval.compare.stream import streamed_model
from qeval.compare.variants import Calibration, Workshop
from qeval.config import parse_method
from qeval.progress import Silent
from tests.fixtures.families import tiny_family
from tests.fixtures.tiny import save_tiny, tiny_tokenizer

METHODS = ("rtn:g32", "rtn:g32-head", "awq:g32-head", "gptq:g32-head", "mixed-rtn:g32-measured", "mixed:g32-fisher")
METHODS_STREAMED = ("rtn:g32-head", "awq:g32-head", "gptq:g32", "mixed-rtn:g32-measured", "mixed:g32-fisher")


class Counted(Silent):
    """Remembers of every phase the units announced and those told."""

    def __init__(self):
        super().__init__()
        self.phases = {}

    @contextmanager
    def phase(self, label, units):
        told = []
        yield told.append
        self.phases[label] = (units, told)


def text():
    ids = torch.randint(1, 256, (6, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return Calibration(tuple(map(tuple, ids)), {"source": "made up", "tokens_sha256": "0"})


@pytest.fixture(scope="module", params=["Llama", "Mixtral"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_family(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return source_of_model(ModelChoice(str(folder)))[1]


@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_announced_is_told(model, method):
    progress, recipe = Counted(), parse_method(method)
    variant, _ = Workshop(model, text, 0, progress).make(recipe)
    weights = sum(weight.codes.numel() for weight in variant.weights.values())
    assert all(sum(told) == units > 0 for units, told in progress.phases.values()), progress.phases
    assert progress.phases[f"quantize {method}"][0] == weights * (2 if recipe.quant_method.scales_inputs else 1)
    assert (f"try groups for {method}" in progress.phases) == method.startswith("mixed")
    assert len(progress.phases[f"quantize {method}"][1]) >= len(model.description.groups)


def test_a_streamed_model_tells_all_of_it_too(tmp_path):
    _, source, backend = streamed_model(ModelChoice(str(save_tiny(tmp_path / "model")), stream=True), folds=True)
    assert isinstance(backend, StreamBackend)
    for method in METHODS_STREAMED:
        progress = Counted()
        with closing(source.workshop(text, 0, progress)) as workshop:
            workshop.write(parse_method(method), tmp_path / method.replace(":", "-"))
        assert progress.phases
        assert all(sum(told) == units > 0 for units, told in progress.phases.values()), (method, progress.phases)
