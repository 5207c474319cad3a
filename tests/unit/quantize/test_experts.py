"""Calibrating experts: how many tokens each one saw, and every token for each of them when that is asked for."""

import json
import shutil
from contextlib import ExitStack

import pytest
import torch

from qeval.config import parse_method
from qeval.errors import UsageError
from qeval.jobs.conformance import Bench
from qeval.models.families import tiny_family
from qeval.models.silence_transformers import quiet
from qeval.models.structure.weight_views import watch_products, weights_of
from qeval.quantize.build import build_variant, source_of
from qeval.quantize.statistics import collect
from tests.fixtures.architectures import tiny_architecture
from tests.fixtures.bench import Bench as Workplace
from tests.fixtures.tiny import tiny_tokenizer

ENDS = {"Qwen3Moe": "mlp.experts", "GptOss": "mlp.experts", "NemotronH": "mixer.experts"}
"""How the names of the modules of experts end."""


@pytest.fixture(scope="module", params=ENDS)
def bench(request):
    model = tiny_family(request.param) if request.param == "Qwen3Moe" else tiny_architecture(request.param)
    with quiet():
        bench = Bench(request.param, model)
    bench.samples = [sample[:20] for sample in bench.samples[:3]]
    return bench


def entered(bench):
    """What enters each module of experts, and which experts its tokens chose: by the module's name."""
    found, model = {}, bench.model
    with torch.inference_mode(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(ENDS[bench.name]):
                found[name] = []
                keep = lambda _, args, name=name: found[name].append(args)  # noqa: E731
                hooks.callback(module.register_forward_pre_hook(keep).remove)
        for sample in bench.samples:
            model.base_model(torch.tensor([sample]), use_cache=False)
    return {name: [torch.cat(parts) for parts in list(zip(*calls, strict=True))[:2]] for name, calls in found.items()}


def inner_inputs(bench, name, tokens, expert):
    """What an expert's inner matrix is given of tokens, by its definition."""
    module, weights = bench.model.get_submodule(name), weights_of(bench.model)
    if bench.name == "NemotronH":
        return module.act_fn(tokens @ weights[f"{name}.up_proj[{expert}]"].T)
    both = tokens @ weights[f"{name}.gate_up_proj[{expert}]"].T
    return module._apply_gate(both + module.gate_up_proj_bias[expert] if bench.name == "GptOss" else both)


@pytest.mark.parametrize("method", ["awq:g32", "gptq:g32"])
def test_the_tokens_of_each_expert_are_counted(bench, method):
    variant, routed = bench.variant(method), entered(bench)
    assert [stack.rpartition(".")[0] for stack in variant.expert_tokens] == list(routed)
    for name, (_, chosen) in routed.items():
        seen, counted = variant.expert_tokens[f"{name}.down_proj"], torch.bincount(chosen.flatten(), minlength=4)
        assert sum(seen) == 2 * sum(map(len, bench.samples))  # two experts a token
        if method.startswith("awq") or ".layers.0." in name:  # gptq reaches later layers through rounded ones
            assert list(seen) == counted.tolist()
    assert bench.variant("rtn:g32").expert_tokens == {}


def test_every_expert_sees_every_token_when_that_is_asked_for(bench):
    before = bench.model.base_model(torch.tensor([bench.samples[0]]), use_cache=False).last_hidden_state
    statistics = collect(bench.model, bench.description, bench.samples, 0, lambda _: None, all_experts=True)
    after = bench.model.base_model(torch.tensor([bench.samples[0]]), use_cache=False).last_hidden_state
    assert torch.equal(before, after)
    total = sum(map(len, bench.samples))
    for name, (tokens, _) in entered(bench).items():
        for expert in range(4):
            found = statistics[f"{name}.down_proj[{expert}]"]
            expected = inner_inputs(bench, name, tokens, expert).abs().mean(0)
            assert found.tokens == total
            assert torch.allclose(found.magnitude, expected, rtol=1e-4, atol=1e-6)

    # what is not an expert's own has the statistics that it has anyway
    plain = collect(bench.model, bench.description, bench.samples, 0, lambda _: None)
    for group in bench.description.groups:
        if not group.is_one_expert:
            assert torch.equal(plain[group.names[0]].magnitude, statistics[group.names[0]].magnitude)


def test_gptq_rounds_by_every_token_too(bench):
    recipe, counts = parse_method("gptq:g32"), {}
    for every in (False, True):
        source = source_of(bench.model, bench.description, bench.head, bench.samples, {}, all_experts=every)
        variant = build_variant(source, recipe, "key", lambda _: None)
        counts[every] = variant.expert_tokens
    total = sum(map(len, bench.samples))
    assert all(set(tokens) == {total} for tokens in counts[True].values())
    assert all(sum(tokens) == 2 * total for tokens in counts[False].values())


def test_llama_4s_experts_are_given_zeros_that_count_for_nothing():
    bench = Bench("Llama4", tiny_architecture("Llama4"))
    stack = "model.layers.1.feed_forward.experts.down_proj"
    total = sum(map(len, bench.samples))
    for every, seen in ((False, None), (True, (total,) * 4)):
        statistics = collect(bench.model, bench.description, bench.samples, 0, lambda _: None, all_experts=every)
        tokens = tuple(statistics[f"{stack}[{expert}]"].tokens for expert in range(4))
        assert tokens == seen if seen else sum(tokens) == total  # one expert a token
        assert all(torch.isfinite(statistics[f"{stack}[{expert}]"].magnitude).all() for expert in range(4))


def test_experts_that_are_handed_their_tokens_in_another_way_are_refused():
    model = tiny_family("Mixtral")
    watched = {"model.layers.0.mlp.experts.down_proj[0]": lambda _: None}
    with (
        watch_products(model, before=watched, all_experts=True),
        pytest.raises(UsageError, match=r"--calibrate-all-experts: MixtralExperts is not handed its tokens in a way"),
    ):
        model.model.layers[0].mlp.experts(torch.zeros(3, 64), torch.zeros(3, 2))


def test_the_program_calibrates_all_experts_streamed_as_in_memory(tmp_path, monkeypatch):
    """With gpt-oss's experts, which lie transposed; in fp16, as real files are."""
    place = Workplace(tmp_path)
    shutil.rmtree(place.model)
    with quiet():
        model = tiny_architecture("GptOss").half()
        model.config.dtype = torch.float16
        model.save_pretrained(place.model)
    tiny_tokenizer().save_pretrained(place.model)
    found = {}
    for flags in (("--calibrate-all-experts",), ("--calibrate-all-experts", "--stream"), ()):
        monkeypatch.setenv("QEVAL_HOME", str(tmp_path / f"home{len(found)}"))
        assert place.compare("--quiet", *flags, methods="awq:g32,gptq:g32", tasks="kl", calibration_samples="2") == 0
        manifests = (tmp_path / f"home{len(found)}" / "variants").glob("*/manifest.json")
        found[flags] = {m["recipe"]["method"]: m for m in map(json.loads, (path.read_text() for path in manifests))}
        report = place.report()
    whole, streamed, routed = found.values()
    for method in ("awq", "gptq"):
        assert streamed[method]["weights_sha256"] == whole[method]["weights_sha256"] != routed[method]["weights_sha256"]
        assert streamed[method]["key"] == whole[method]["key"] != routed[method]["key"]
        assert streamed[method]["expert_tokens"] == whole[method]["expert_tokens"]
        assert {tuple(seen) for seen in whole[method]["expert_tokens"].values()} == {(64,) * 4}

    # 64 tokens are few, and the report of the last run says so and shows how many reached each expert
    assert any("of 8 experts saw fewer than 128 calibration tokens" in warning for warning in report["warnings"])
    assert report["variants"][0]["expert_tokens"] == routed["awq"]["expert_tokens"]
    assert "Experts' calibration tokens" in (place.out / "report.md").read_text()
