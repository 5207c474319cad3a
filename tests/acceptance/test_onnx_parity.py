"""ONNX Runtime's kernels against fake quantization: the same integers, in fp32 on both sides.

Over the first 1,024 tokens of WikiText-2's test file the mean KL(fake-quantized || ORT at level 1) is at most 1e-8
nats and no logit differs by more than 1e-3, but at one position at most, and there it doesn't when the tokens are cut
in two; questions of MMLU get the same answers. The demo model; Gemma-3-270m too where QEVAL_GEMMA names its folder or
GGUF file. A few grids and questions by default; QEVAL_PARITY=full takes every grid, with and without the head, and a
thousand questions (most of an hour on two cores).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from qeval.backends.torch import TorchBackend, TorchSession
from qeval.compare.loading import source_of_model
from qeval.compare.plan import calibration_of
from qeval.compare.settings import BackendChoice, CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop
from qeval.config import parse_method
from qeval.metrics.tokens import near_kl
from qeval.models.info import LoadedModel
from qeval.progress import Silent
from qeval.score.choices import score_questions
from qeval.store.variants import load_variant
from qeval.tasks.harness import Question, load_suite
from qeval.types import Request
from tests.fixtures.data import data, needs

for needed in ("onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(needed)

from qeval.backends.onnx.backend import OrtBackend
from qeval.backends.onnx.session import OrtSession
from qeval.compare.onnx import ort_backends

TEXT, MMLU = data("wikitext2/test.txt"), data("mmlu")
TOKENS = 1024
MOST_KL_NATS, MOST_LOGIT_DIFFERENCE, LEAST_SAME_ANSWERS = 1e-8, 1e-3, 0.999

IS_FULL = os.environ.get("QEVAL_PARITY") == "full"
GRIDS = ("rtn:g32", "rtn:g32-asym", "rtn:g128", "rtn:g128-asym", "rtn:int8-g128", "rtn:int8-channel", "awq:", "mixed:")
ALL = tuple(grid.rstrip(":") for grid in GRIDS) + tuple(f"{grid}-head".replace(":-", ":") for grid in GRIDS)
SOME = ("rtn:g32", "rtn:g128-asym-head", "rtn:int8-channel", "awq")
METHODS = ALL if IS_FULL else SOME
SUBJECTS, QUESTIONS = (("anatomy", "marketing", "astronomy", "nutrition", "philosophy"), 200)
if not IS_FULL:
    SUBJECTS, QUESTIONS = SUBJECTS[:2], 15
CALIBRATION = CalibrationChoice() if IS_FULL else CalibrationChoice(samples=4)
MODELS = {"demo": "demo", "gemma": os.environ.get("QEVAL_GEMMA", "")}

pytestmark = [
    pytest.mark.slow,
    needs("wikitext2/test.txt", "mmlu"),
]


@dataclass(frozen=True, eq=False)
class Side:
    """One model on both backends."""

    loaded: LoadedModel
    workshop: Workshop
    torch: TorchBackend
    ort: OrtBackend

    @contextmanager
    def sessions(self, method: str | None) -> Iterator[tuple[TorchSession, OrtSession]]:
        """The variant of a method, or the float model, on torch and on ONNX Runtime."""
        variant = load_variant(self.workshop.folder(parse_method(method))) if method else None
        with self.torch.open(variant) as ours, self.ort.open(variant) as theirs:
            yield ours, theirs

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first tokens of WikiText-2."""
        return tuple(self.loaded.tokenizer(TEXT.read_text(encoding="utf-8")[: 8 * TOKENS]).input_ids[:TOKENS])

    def questions(self) -> tuple[Question, ...]:
        """The first questions of some subjects."""
        suite = load_suite(
            "mmlu",
            self.loaded.tokenizer,
            max_length=self.loaded.info.context_length,
            bos="auto",
            shots=5,
            limit=QUESTIONS,
            folder=MMLU,
            subjects=SUBJECTS,
        )
        return suite.questions


@cache
def side(name: str) -> Side:
    """A model, loaded and exported once."""
    if not MODELS[name]:
        pytest.skip("QEVAL_GEMMA names no folder and no GGUF file of Gemma-3-270m")
    loaded, source = source_of_model(ModelChoice(MODELS[name]))
    workshop = Workshop(source, lambda: calibration_of(CALIBRATION, loaded), 0, Silent())
    backend = TorchBackend(loaded.model, source.description, source.head, source.weight_dtype)
    return Side(loaded, workshop, backend, ort_backends(BackendChoice(("ort",)), loaded, source.description)[1])


@pytest.fixture
def show(request):
    """Prints a line though pytest captures what tests print."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", end=" ", flush=True)  # noqa: T201 - figures for a person

    return line


def differences(
    ours: TorchSession, theirs: OrtSession, tokens: tuple[int, ...], first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in nats and the largest difference of a logit, at each position from `first` on; what comes before is run as
    a prefix."""
    requests = [Request(tokens[first:], tuple(range(len(tokens) - first)))]
    mine, other = (s.states(requests, s.prefill(tokens[:first]) if first else None)[0] for s in (ours, theirs))
    blocks = [slice(start, start + 16) for start in range(0, len(mine), 16)]
    largest = [(ours.logits(mine[rows]) - theirs.logits(other[rows])).abs().amax(-1) for rows in blocks]
    return near_kl(ours.logits, mine, theirs.logits, other), torch.cat(largest)


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_give_the_logits_of_fake_quantization(model, method, show):
    both = side(model)
    with both.sessions(method) as (ours, theirs), torch.inference_mode():
        kl, largest = differences(ours, theirs, both.tokens)
        over = (largest > MOST_LOGIT_DIFFERENCE).nonzero().flatten()
        if len(
            over
        ):  # a rounding that the model itself magnifies comes out otherwise when the tokens are cut otherwise
            cut = int(over[0]) // 2
            again = differences(ours, theirs, both.tokens, cut)[1][over - cut]
    kl_said = f"KL {float(kl.mean()):.1e} (max {float(kl.max()):.1e}) nats"
    logits_said = f"largest logit difference {float(largest.max()):.1e}" + f", {len(over)} too large" * bool(len(over))
    show(f"{model:6} {method or 'float':24} {kl_said}, {logits_said}")
    assert abs(float(kl.mean())) <= MOST_KL_NATS
    assert len(over) <= TOKENS // 1000
    assert not len(over) or float(again.max()) <= MOST_LOGIT_DIFFERENCE


@pytest.mark.parametrize("model", MODELS)
def test_a_chunked_prefill_scores_as_a_whole_one(model):
    both = side(model)
    tokens, half = both.tokens, TOKENS // 2
    with both.ort.open(None) as session:
        (whole,) = session.states([Request(tokens, tuple(range(half, TOKENS)))])
        prefix = session.prefill(tokens[:half])
        (chunk,) = session.states([Request(tokens[half:], tuple(range(TOKENS - half)))], prefix)
        for start in range(0, half, 16):
            rows = slice(start, start + 16)
            one, other = (torch.log_softmax(session.logits(states[rows]), -1) for states in (whole, chunk))
            torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # every token's
            told = torch.tensor(tokens[half + start + 1 : half + start + 17])[:, None]
            torch.testing.assert_close(
                one[: len(told)].gather(1, told), other[: len(told)].gather(1, told), atol=1e-4, rtol=0
            )


@pytest.mark.skipif(not MMLU.exists(), reason="no MMLU beside the project")
@pytest.mark.parametrize("model", MODELS)
def test_questions_get_the_same_answers(model, show):
    both = side(model)
    questions = both.questions()
    with both.sessions("rtn:g32") as sessions:
        ours, theirs = (
            torch.tensor(
                [[score for score, _ in row] for row in score_questions(s, questions, 2048, lambda done: None)]
            )
            for s in sessions
        )
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    difference = float((ours - theirs).abs().max())
    show(
        f"{model:6} MMLU, {len(questions)} questions: {same:.2%} same answers, log-likelihoods within {difference:.1e}"
    )
    assert same >= LEAST_SAME_ANSWERS
    assert difference <= MOST_LOGIT_DIFFERENCE
