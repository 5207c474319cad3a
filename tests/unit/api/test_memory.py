"""A transformers model that is loaded already, as `model=`: the rows of its folder, and nothing of it changed."""

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qeval
from qeval.backends import memory
from qeval.models.checkpoint.weights import read_entries, weight_files, weights_sha256
from qeval.models.in_memory import memory_model
from tests.fixtures.bench import Bench, keywords, row_differences
from tests.fixtures.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        yield Bench(folder)


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def state_of(model):
    """Everything of a model that a call might leave changed."""
    tensors = {name: (tensor, tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    return tensors, modes, grads, model.config.to_json_string()


def assert_unchanged(model, before):
    now = state_of(model)
    for name, (tensor, copy) in before[0].items():
        assert now[0][name][0] is tensor
        assert torch.equal(tensor, copy)
    assert now[1:] == before[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_gives_the_rows_of_its_folder_and_is_left_as_it_was(place, tmp_path, dtype):
    folder = save_tiny(tmp_path / "model", seed=3, dtype=dtype, max_position_embeddings=512)
    model, tokenizer = loaded(folder, dtype)
    model.train()
    before = state_of(model)
    threads = torch.get_num_threads()
    mine = qeval.compare(model, tokenizer=tokenizer, **keywords(place, out=tmp_path / "memory"))
    assert_unchanged(model, before)
    assert torch.get_num_threads() == threads
    saved = qeval.compare(str(folder), **keywords(place, out=tmp_path / "saved"))
    assert row_differences(mine.folder, saved.folder) == []
    assert mine.record.model.weights_sha256 == saved.record.model.weights_sha256
    assert mine.record.model.source == "memory"
    assert mine.record.settings is None
    pd.testing.assert_frame_equal(mine.summary(), saved.summary())


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_models_hash_is_that_of_its_folder(tmp_path, tied):
    folder = save_tiny(tmp_path, tie_word_embeddings=tied)
    model, tokenizer = loaded(folder, torch.float16)
    in_memory = memory_model(model, tokenizer)
    assert in_memory.weights_sha256() == weights_sha256(read_entries(weight_files(folder)))
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert in_memory.weights_sha256() != weights_sha256(read_entries(weight_files(folder)))


def test_a_loaded_model_in_half_precision_is_left_as_it_was(place, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "has_bf16", lambda: True)  # it is slow without, and right
    model, tokenizer = tiny_llama(max_position_embeddings=512).to(torch.bfloat16), tiny_tokenizer()
    before = state_of(model)
    run = qeval.compare(
        model, tokenizer=tokenizer, compute="bf16", **keywords(place, methods="rtn:g32", tasks="kl", out=tmp_path)
    )
    assert_unchanged(model, before)
    assert run.record.model.compute_dtype == "bfloat16"
    assert {"rtn:g32", "baseline@fp32"} == {each.name for each in run.report.variants}


def test_weights_that_change_while_they_are_scored_are_noticed(place, tmp_path, monkeypatch):
    model, tokenizer = loaded(place.model)

    def change(plan):
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] += 1

    with pytest.raises(qeval.QevalError, match="were changed while they were scored"):
        qeval.compare(model, tokenizer=tokenizer, on_plan=change, **keywords(place, out=tmp_path / "changed"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stream": True}, "--stream reads a model from its folder"),
        ({"backend": "ort"}, "--backend ort reads a model from its folder"),
        ({"backend": ["torch", "llama.cpp"]}, "--backend llama.cpp reads a model from its folder"),
        ({"workers": 2}, "--workers 2 reads a model from its folder"),
        ({"executor": "ray"}, "--executor ray reads a model from its folder"),
    ],
)
def test_what_needs_a_folder_says_to_save_the_model(place, tmp_path, more, said):
    model, tokenizer = loaded(place.model)
    with pytest.raises(qeval.UsageError, match=said) as refused:
        qeval.compare(model, tokenizer=tokenizer, **keywords(place, out=tmp_path / "out", **more))
    assert "save_pretrained" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused_in_a_sentence(place):
    model, tokenizer = loaded(place.model)
    cases = [
        ((model, None), {}, "needs its tokenizer"),
        ((str(place.model), tokenizer), {}, "leave tokenizer out"),
        ((torch.nn.Linear(2, 2), tokenizer), {}, "model is a Linear"),
        ((model, tokenizer), {"revision": "main"}, "--revision main needs a model on the hub"),
        ((model, tokenizer), {"device": "cuda"}, "the loaded model lies on cpu"),
    ]
    for (what, speaks), more, said in cases:
        with pytest.raises(qeval.UsageError, match=said):
            qeval.compare(what, tokenizer=speaks, **keywords(place, **more))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(qeval.UsageError, match="quantized already \\(gptq\\)"):
        qeval.compare(model, tokenizer=tokenizer, **keywords(place))


def test_the_run_of_a_loaded_model_is_checked_but_not_made_again(place, tmp_path):
    model, tokenizer = loaded(place.model)
    run = qeval.compare(model, tokenizer=tokenizer, **keywords(place, methods="rtn:g32", tasks="kl", out=tmp_path))
    found = qeval.verify(run)
    assert found.problems == []
    assert "a model that was in memory" in found.undone


def test_lm_eval_scores_a_loaded_model_and_its_folder_alike(tmp_path):
    from lm_eval.api.instance import Instance

    folder = save_tiny(tmp_path, bos=True)
    model, tokenizer = loaded(folder)
    asked = [Instance("loglikelihood", {}, ("Line 1: the", " birds"), 0), Instance("loglikelihood", {}, ("A", " b"), 1)]
    answers = [qeval.lm_eval_model(model, tokenizer).loglikelihood(asked)]
    answers.append(qeval.lm_eval_model(str(folder), device="cpu").loglikelihood(asked))
    assert answers[0] == answers[1]
    session = qeval.lm_eval_model(model, tokenizer)._session
    assert qeval.lm_eval_model(session, tokenizer).loglikelihood(asked) == answers[0]
    with pytest.raises(qeval.UsageError, match="give the tokenizer"):
        qeval.lm_eval_model(session)


def test_the_report_of_a_loaded_model_tells_no_place_of_the_machine(place, tmp_path):
    model, tokenizer = loaded(place.model)
    run = qeval.compare(model, tokenizer=tokenizer, **keywords(place, methods="rtn:g32", tasks="kl", out=tmp_path))
    for name in ("report.json", "report.md", "report.html"):
        assert str(place.folder) not in (run.folder / name).read_text()
    assert run.report.model.name == "model"
    assert run.report.provenance.command.startswith("qeval.compare(model=<LlamaForCausalLM>, ")
