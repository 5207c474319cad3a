"""`--stream` over architectures that do more than attend: the states, descriptions and variants of the model in memory.

The oracle is the model in memory: transformers' own pass over whole sequences for states, `build_variant` for files.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from qeval.backends.sharing import WHOLE
from qeval.backends.stream.backend import StreamBackend, inspect, streamed
from qeval.backends.torch import TorchSession
from qeval.compare.stream import StreamedModel
from qeval.compare.variants import BaselineModel, Calibration
from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import read_entries
from qeval.models.silence_transformers import quiet
from qeval.models.structure.graph import describe_model
from qeval.models.structure.head import head_of
from qeval.models.tiny import tiny_config, tiny_model
from qeval.progress import Silent
from qeval.types import Call, Request
from tests.fixtures.architectures import ARCHITECTURES, tiny_architecture

LIMIT = 64 << 20
OTHERS = ("deepseek_v4", "zamba2", "bamba", "openai-gpt", "sarvam_moe", "bert", "doge")
"""Of streams of states beside each other and experts by token; of a block that layers share; of tuples and lists; of
projections that lie in one tensor; of a transform before the head; of a mask that changes with what is shared."""
WHOLE_QUESTIONS = {"Mamba", "Jamba", "MiniMax", "bamba", "openai-gpt", "xLSTM", "LongcatFlash"}
"""Those whose continuations start empty, or that have a cache of their own, or none, or two parts of it a layer."""
REFUSED = {
    "Dory": "runs its decoder layers in an order of its own, or some more than once",
    "HrmText": "has several stacks of layers that read each other's states",
    "Blt": "has several stacks of layers that read each other's states",
}
METHODS = ("rtn:g32", "awq:g32", "gptq:g32")
MIXED = ("mixed-rtn:g32-measured-6bpw", "mixed-rtn:g32-fisher-6bpw")


def tokens(count, seed=0):
    return tuple(torch.randint(1, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def model_of(name):
    with quiet():
        return tiny_architecture(name) if name in ARCHITECTURES else tiny_model(tiny_config(name))


def stream_of(model, folder):
    """The model streamed from a checkpoint of it."""
    with quiet():
        model.save_pretrained(folder)
        entries = read_entries([folder / "model.safetensors"])
        weightless, _ = build_meta_model(model.config, torch.float32, entries, str(folder))
    weightless.base_model_prefix = model.base_model_prefix
    return streamed(weightless, entries, torch.device("cpu"), "float32")


@pytest.mark.parametrize(("name", "sentence"), REFUSED.items())
def test_layers_that_do_not_follow_one_another_are_refused(name, sentence, tmp_path):
    with pytest.raises(UsageError, match=rf"{sentence}.* leave --stream out"):
        inspect(stream_of(model_of(name), tmp_path), "float32")


@pytest.mark.parametrize("name", [*(name for name in ARCHITECTURES if name not in REFUSED), *OTHERS])
def test_states_are_those_of_the_model_in_memory_and_questions_those_of_whole_sequences(name, tmp_path):
    model, prefix = model_of(name), tokens(11)
    whole = TorchSession(model, sharing=WHOLE)
    questions = (Request(tokens(9, seed=2), (0, 8)), Request(tokens(7, seed=3), (6,)))
    windows = (Request(tokens(40, seed=5), tuple(range(40))), Request(tokens(40, seed=6), (39,)))
    made = stream_of(model, tmp_path)
    backend = StreamBackend(made, *inspect(made, "float32"), LIMIT)
    assert backend.shares_prefixes == (name not in WHOLE_QUESTIONS)
    with backend.open(None) as session:
        session.expect([Call((), windows), Call((prefix,), questions)])
        found = session.states(windows)
        assert all(map(torch.equal, found, whole.states(windows)))
        assert torch.equal(session.logits(found[0]), whole.logits(found[0]))
        answers = session.states(questions, session.prefill(prefix))
        for one, other in zip(answers, whole.states([each.after(prefix) for each in questions]), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert session.passes == 1


def test_a_tensor_of_several_projections_that_has_other_rows_is_named(tmp_path):
    with quiet():
        model = model_of("sarvam_moe")
        model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("query_key_value.weight"))
    save_file({**state, name: state[name][:-2].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=rf"holds {re.escape(name)} as \[\d+, 64\], its model needs \d+ rows"):
        build_meta_model(model.config, torch.float32, read_entries([tmp_path / "model.safetensors"]), "here")


def workshops(name, folder, *, folds=True):
    """What makes variants of one model in memory, and of the same model streamed."""
    model = model_of(name)
    made = stream_of(model, folder)
    description, head = inspect(made, "float32", folds=folds)
    assert description == describe_model(model, folds=folds) or not description.in_turn
    fp32, calibration = torch.float32, Calibration(tuple(tokens(16, n) for n in range(8)), {"tokens_sha256": name})
    same = {
        "weights_sha256": name,
        "config_sha256": name,
        "name": name,
        "weight_dtype": fp32,
        "compute_dtype": fp32,
        "device": torch.device("cpu"),
    }
    backend = StreamBackend(made, description, head, LIMIT)
    stream = StreamedModel(model=made.model, description=description, head=head, backend=backend, **same)
    memory = BaselineModel(model=model, description=description, head=head_of(model), **same)
    return {
        "whole": memory.workshop(lambda: calibration, 0, Silent()),
        "streamed": stream.workshop(lambda: calibration, 0, Silent()),
    }


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("Jamba", METHODS),
        ("NemotronH", METHODS[1:2]),
        ("Qwen3Next", METHODS[2:]),
        ("KimiLinear", METHODS[1:2]),
        ("GlmMoeDsa", METHODS[2:]),
        ("GptOss", METHODS[1:2]),
        ("Llama4", METHODS),
        ("Gemma3n", (*METHODS[:2], *MIXED)),
        ("Gemma4", (*METHODS[1:], MIXED[1])),
        ("deepseek_v4", METHODS),
        ("zamba2", METHODS[:1]),
    ],
)
def test_variants_are_the_files_of_the_model_in_memory(name, methods, tmp_path, monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    made = workshops(name, tmp_path / "model")
    for method in methods:
        manifests = []
        for place, workshop in made.items():
            monkeypatch.setenv("QEVAL_HOME", str(tmp_path / place))  # trials are remembered there
            workshop.write(parse_method(method), tmp_path / place / method)
            manifests.append(json.loads((tmp_path / place / method / "manifest.json").read_text()))
        one, other = ({**each, "seconds": 0, "sha256": None} for each in manifests)
        assert one == other, method


def test_states_in_another_layout_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"XLNetLMHeadModel lays its states as \[tokens, batch, width\]"):
        inspect(stream_of(model_of("xlnet"), tmp_path), "float32")


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_calibrated_method_is_refused_where_layers_share_weights(method, tmp_path):
    with pytest.raises(
        UsageError, match=r"2 layers of Zamba2ForCausalLM share weights .*; leave --stream out, or take rtn"
    ):
        workshops("zamba2", tmp_path, folds=False)["streamed"].write(parse_method(method), tmp_path / "out")
