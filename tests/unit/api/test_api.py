"""`import qeval`: the functions behind the commands give the same rows, tables, figures and sentences as they do."""

import json
import subprocess
import sys
from inspect import signature

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import qeval
from qeval.api.making import quantize
from qeval.api.process import call_text
from qeval.cli.app import run_program as program
from tests.fixtures.bench import METHODS, Bench, keywords, row_differences

NAMES = METHODS.split(",")
ANSWERS = {"rtn:g32", "awq:g32", "mixed-rtn:g32", "baseline"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bench with a run that the command made, in OUT, and one that the function made, in api."""
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(folder / "home"))
        bench = Bench(folder)
        assert bench.compare("--quiet") == 0
        yield bench


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """The same run by the function, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEVAL_HOME", str(tmp_path_factory.mktemp("home")))
        return qeval.compare(str(place.model), **keywords(place, out=place.folder / "api"))


SIGNATURES = {
    "advise": "run variant *corpus max_windows offline threads out progress",
    "bench": "model *revision methods variants engines batch prompt generate ep accuracy_level device calibration "
    "calibration_samples calibration_length calibrate_all_experts "
    "offline budget importance quantize_head corpus threads time_budget repeats "
    "quality reference base seed out progress on_plan on_record command",
    "board": "runs *out accept export",
    "card": "run variant *into",
    "compare": "model *tokenizer revision methods config variants external_parts kv_types backend "
    "endpoint_model endpoint_top endpoint_key_variable endpoint_timeout endpoint_requests "
    "vllm_python vllm_dtype vllm_tensor_parallel vllm_kv_cache accuracy_level ep "
    "exporter format precision "
    "device compute stream max_memory device_map tasks corpus protocol convention window stride max_windows bos "
    "sampling mmlu_dir subjects "
    "limit shots apply_chat_template fewshot_as_multiturn system_instruction drift_prompts drift_prompt_tokens "
    "drift_tokens needle_lengths needle_depths needle_haystacks prompts template chat_tokens chat_temperature "
    "reasoning_questions reasoning_tokens grammar_calls "
    "calibration calibration_samples calibration_length "
    "calibrate_all_experts "
    "offline budget importance quantize_head batch_tokens threads workers executor worker_gpus split seed out progress "
    "on_plan command",
    "diff": "run_a run_b *variants",
    "export": "model *method to run revision device compute ep exporter format accuracy_level precision calibration "
    "calibration_samples calibration_length calibrate_all_experts "
    "offline budget importance quantize_head threads seed out progress",
    "gate": "run policy *variants against junit markdown summary",
    "gate_model": "model policy *method revision device compute stream max_memory device_map corpus protocol window "
    "stride "
    "max_windows mmlu_dir limit shots calibration calibration_samples calibration_length calibrate_all_experts "
    "offline threads seed out "
    "junit markdown summary progress command",
    "import_rows": "files *out baseline task repeats higher_is_better command",
    "lm_eval_model": "model tokenizer *bos batch_tokens device compute",
    "load": "folder",
    "quantize": "model *method revision device compute stream max_memory device_map calibration calibration_samples "
    "calibration_length calibrate_all_experts offline budget importance quantize_head threads seed out progress",
    "selfcheck": "*rows table data mmlu_dir device threads progress",
    "sensitivity": "model *method budgets formats revision device compute device_map calibration calibration_samples "
    "calibration_length calibrate_all_experts offline measured_samples threads seed out progress",
    "sweep": "models *out bits groups budgets calibration_seeds models_at_once progress listener commands **options",
    "verify": "run *sample seed progress",
}
CLASSES = {"BrokenRecordError", "QevalError", "Run", "UsageError", "__version__"}


def words_of(function):
    """A signature as names in order: * before the first keyword-only one, ** before what takes all others."""
    found, starred = [], False
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.append(f"**{name}")
            continue
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY and not starred else ""
        starred = starred or bool(star)
        found.append(star + name)
    return " ".join(found)


def test_the_public_names_and_their_parameters_are_these():
    assert set(qeval.__all__) == set(SIGNATURES) | CLASSES
    assert {name: words_of(getattr(qeval, name)) for name in SIGNATURES} == SIGNATURES
    assert set(qeval.__all__) <= set(dir(qeval))
    assert qeval.compare.__doc__.startswith("Quantize a model each way")
    with pytest.raises(AttributeError, match="no attribute 'compair'"):
        _ = qeval.compair


@pytest.mark.parametrize("command", ["bench", "compare", "export", "gate", "quantize", "sensitivity", "selfcheck"])
def test_every_flag_is_a_keyword_with_the_same_default(command):
    import typer

    from qeval.cli.app import app

    flags = {each.name: each.default for each in typer.main.get_command(app).commands[command].params}
    only_printed = {"as_json", "quiet", "debug", "help"}
    functions = [qeval.gate, qeval.gate_model] if command == "gate" else [getattr(qeval, command)]
    parameters = {name: each for function in functions for name, each in signature(function).parameters.items()}
    for name, default in flags.items():
        if name in only_printed:
            continue
        keyword = parameters[name]
        if keyword.default is not keyword.empty:
            assert keyword.default == default, name


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_it_takes_a_handful_of_modules_and_none_that_is_heavy():
    code = "import sys; before = set(sys.modules); import qeval; print(*sorted(set(sys.modules) - before))"
    loaded = python(code)
    assert "qeval" in loaded
    assert not {"qeval.api", "torch", "transformers", "pandas", "numpy", "matplotlib", "typer", "yaml"} & set(loaded)
    assert len(loaded) < 40


def test_looking_at_a_function_takes_no_torch():
    code = "import qeval, sys; qeval.compare, qeval.load; print(*sys.modules)"
    assert not {"torch", "transformers", "pandas", "matplotlib"} & set(python(code))


@pytest.mark.parametrize("first", ["qeval.compare", "qeval.compare.settings", "qeval.gate.policy", "qeval.report.diff"])
def test_a_package_of_a_functions_name_is_called_as_the_function_whatever_was_imported_first(first):
    code = (
        f"import {first}, qeval\n"
        "from qeval import compare, gate, diff, card, bench\n"
        "from qeval.compare.settings import Settings\n"
        "for each in (compare, gate, diff, card, bench):\n"
        "    try: each()\n"
        "    except TypeError as error: print(str(error).partition('(')[0])\n"
    )
    assert python(code) == ["compare", "gate", "diff", "card", "bench"]


def test_the_text_of_a_call_holds_what_was_given():
    arguments = {name: each.default for name, each in signature(qeval.quantize).parameters.items()}
    arguments |= {"model": "demo", "method": "rtn", "seed": 3}
    assert call_text(quantize, arguments) == "qeval.quantize(model='demo', method='rtn', seed=3)"


def test_the_functions_rows_are_the_commands_byte_for_byte(place, run):
    assert row_differences(run.folder, place.out) == []
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (run.folder, place.out))
    for report in (ours, theirs):
        report["provenance"] = None
        for variant in report["variants"]:
            variant["quantize_seconds"] = variant["score_seconds"] = None
        report["baseline"]["seconds"] = None
    assert ours == theirs
    assert run.failed == ()
    assert run.record.command.startswith(f"qeval.compare(model='{place.model}', methods=['rtn:g32', ")


def test_a_finished_run_is_loaded_as_it_was_returned(place, run):
    loaded = qeval.load(place.out)
    pd.testing.assert_frame_equal(loaded.summary(), run.summary())
    assert str(loaded) == str(run)
    assert repr(loaded) == f"<Run '{place.out}': rtn:g32, awq:g32, mixed-rtn:g32 of model>"
    assert loaded.page.is_file()
    with pytest.raises(qeval.UsageError):
        qeval.load(place.folder)


def test_the_summary_holds_every_figure_of_the_report(place, run):
    table = run.summary()
    assert list(table.columns) == ["variant", "metric", "value", "low", "high", "unit", "n"]
    assert set(table["variant"]) == ANSWERS
    report = place.report()
    told = {"baseline": report["baseline"], **{each["name"]: each for each in report["variants"]}}
    rows = [(name, metric) for name, each in told.items() for metric in each["metrics"]]
    assert list(zip(table["variant"], table["metric"], strict=True)) == rows
    for row in table.to_dict("records"):
        expected = told[row["variant"]]["metrics"][row["metric"]]
        for field in ("value", "low", "high"):
            assert row[field] == expected[field] or (np.isnan(row[field]) and expected[field] is None)
        assert (row["unit"], row["n"]) == (expected["unit"], expected["n"])


def test_a_metric_is_an_estimate_and_an_unknown_one_lists_the_others(place, run):
    estimate, expected = run.metric("awq:g32", "kl_nats"), place.report()["variants"][1]["metrics"]["kl_nats"]
    assert (estimate.value, estimate.low, estimate.high) == tuple(expected[name] for name in ("value", "low", "high"))
    assert (estimate.unit, estimate.n) == ("nats", 256)
    assert run.metric("baseline", "ppl").unit == "ppl"
    with pytest.raises(qeval.UsageError, match="Unknown metric of 'awq:g32' 'kl_nat'; nearest: kl_nats"):
        run.metric("awq:g32", "kl_nat")
    with pytest.raises(qeval.UsageError, match=r"Unknown variant of the run .* 'awk:g32'; nearest: awq:g32"):
        run.metric("awk:g32", "kl_nats")


def test_token_rows_stand_beside_the_baselines(run):
    rows = run.tokens("rtn:g32")
    assert len(rows) == 4 * 64
    assert {"window", "position", "token", "nll", "baseline_nll", "kl_nats", "delta_p"} <= set(rows.columns)
    assert rows["kl_nats"].mean() == pytest.approx(run.metric("rtn:g32", "kl_nats").value, rel=1e-12)
    assert rows["nll"].isna().sum() == rows["baseline_nll"].isna().sum() == 4
    assert (rows.loc[rows["nll"].isna(), "position"] == 0).all()
    ratio = np.exp((rows["nll"] - rows["baseline_nll"]).mean())
    assert ratio == pytest.approx(run.metric("rtn:g32", "ppl_ratio").value, rel=1e-9)
    delta = np.exp(-rows["nll"]) - np.exp(-rows["baseline_nll"])
    assert np.allclose(delta[1:], rows["delta_p"][1:], atol=1e-9, equal_nan=True)
    assert rows["top1_agreement"].mean() == pytest.approx(run.metric("rtn:g32", "top1_agreement").value)
    with pytest.raises(qeval.UsageError, match="nearest: rtn:g32"):
        run.tokens("rtn:g33")


def test_questions_stand_beside_the_baselines(run):
    rows = run.questions("mixed-rtn:g32")
    assert list(rows.columns[:4]) == ["task", "subject", "item", "gold"]
    assert len(rows) == 8
    assert set(rows["task"]) == {"mmlu"}
    assert set(rows["subject"]) == {"astronomy", "philosophy"}
    assert rows["acc"].mean() == run.metric("mixed-rtn:g32", "mmlu_acc").value
    assert rows["baseline_acc"].mean() == run.metric("baseline", "mmlu_acc").value
    for row in rows.to_dict("records"):
        assert int(np.argmax(row["loglikelihoods"])) == row["pred"]
        assert int(np.argmax(row["baseline_loglikelihoods"])) == row["baseline_pred"]
        assert row["acc"] == (row["pred"] == row["gold"])


def test_a_run_without_tokens_or_questions_says_what_to_ask_for(place, tmp_path):
    run = qeval.compare(str(place.model), **keywords(place, tasks="kl", methods="rtn:g32", out=tmp_path / "kl"))
    with pytest.raises(qeval.UsageError, match="asked no questions; compare with --tasks mmlu"):
        run.questions("rtn:g32")
    with pytest.raises(qeval.UsageError, match="asked no questions"):
        run.plot.categories()
    with pytest.raises(qeval.UsageError, match="needs two variants"):
        run.plot.quality_size()
    with pytest.raises(qeval.UsageError, match="needs perplexities"):
        run.plot.perplexity()


def test_plots_are_figures_and_pyplot_is_left_alone(run):
    settings = dict(plt.rcParams)
    plot = run.plot
    drawn = [plot.quality_size(), plot.kl_distribution(), plot.perplexity(), plot.categories("mmlu")]
    drawn.append(plot.layers("mixed-rtn:g32"))
    assert all(isinstance(each, Figure) and each.axes for each in drawn)
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == settings
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "Size on disk (MB)"
    marks = {line.get_label(): line.get_xydata() for line in axes.lines}
    for variant in run.report.variants:
        value = variant.metrics["kl_nats"].value
        assert marks[variant.name].tolist() == [[variant.size_bytes / 1e6, value]]
    with pytest.raises(qeval.UsageError, match="needs a variant of a mixed method"):
        plot.layers("rtn:g32")
    with pytest.raises(qeval.UsageError, match="Unknown task of the run 'mmlv'; nearest: mmlu"):
        plot.categories("mmlv")


def test_the_page_of_a_notebook_is_the_reports_and_escaped(run):
    html = run._repr_html_()
    for name in NAMES:
        assert f"<td>{name}</td>" in html
    assert "Size and loss of every variant" in html
    odd = run.report.model.model_copy(update={"name": "<img src=x onerror=alert(1)>"})
    html = qeval.Run(run.folder, run.record, run.report.model_copy(update={"model": odd}))._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x" in html


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"methods": "rtm"}, ["--methods", "rtm"]),
        ({"methods": ""}, ["--methods", ""]),
        ({"tasks": []}, ["--tasks", ""]),
        ({"max_memory": "2GiB"}, ["--max-memory", "2GiB"]),
        ({"compute": "fp8"}, ["--compute", "fp8"]),
        ({"variants": ["name"]}, ["--variant", "name"]),
        ({"subjects": ""}, ["--subjects", ""]),
        ({"backend": "tensorrt"}, ["--backend", "tensorrt"]),
        ({"accuracy_level": [2]}, ["--accuracy-level", "2"]),
        ({"budget": 4.8}, ["--budget", "4.8"]),
        ({"limit": 0}, ["--limit", "0"]),
        ({"protocol": "wikitext3"}, ["--protocol", "wikitext3"]),
        ({"threads": 10**6}, ["--threads", str(10**6)]),
        ({"calibration": "nowhere.txt"}, ["--calibration", "nowhere.txt"]),
    ],
)
def test_errors_are_the_sentences_of_the_command(place, tmp_path, capfd, changed, flags):
    assert place.compare("--quiet", *flags, methods="awq:g32", out=str(tmp_path / "out")) == 2
    sentence = capfd.readouterr().err.removeprefix("error: ").rstrip("\n")
    with pytest.raises(qeval.UsageError) as refused:
        qeval.compare(str(place.model), **{**keywords(place, methods="awq:g32", out=tmp_path / "out"), **changed})
    assert str(refused.value) == sentence
    assert not (tmp_path / "out").exists()


def test_a_tilde_is_the_home_folder_as_in_a_shell(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(place.folder))
    asked = keywords(place, corpus="~/corpus.txt", mmlu_dir="~/mmlu", calibration="~/seen.txt", out="~/home-run")
    run = qeval.compare("~/model", **asked | {"methods": "awq:g32"})
    assert run.folder == place.folder / "home-run"
    assert qeval.load("~/home-run").metric("awq:g32", "kl_nats") == run.metric("awq:g32", "kl_nats")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bos": "often"}, "Unknown BOS policy 'often'"),
        ({"precision": "fp8"}, "Unknown precision 'fp8'"),
        ({"executor": "slurm"}, "Unknown executor 'slurm'"),
        ({"importance": "fissher"}, "Unknown importance 'fissher'; nearest: fisher"),
        ({"shots": -1}, "--shots must be at least 0, not -1"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
    ],
)
def test_what_the_commands_parser_refuses_the_function_refuses_too(place, changed, said):
    with pytest.raises(qeval.UsageError, match=said):
        qeval.compare(str(place.model), **keywords(place, **changed))


def test_warnings_go_to_the_log_and_into_the_record(place, tmp_path, caplog):
    (tmp_path / "same.txt").write_text("Line.\n" * 400)
    asked = keywords(place, tasks="drift", corpus=tmp_path / "same.txt", methods="rtn:g32", max_windows=None)
    run = qeval.compare(
        str(place.model),
        **asked | {"drift_prompts": 8, "drift_prompt_tokens": 60, "drift_tokens": 4, "out": tmp_path / "out"},
    )
    assert any("8 prompts were asked for" in warning for warning in run.record.warnings)
    assert [each.message for each in caplog.records if each.name == "qeval"] == run.record.warnings


def test_a_gate_takes_a_run_a_folder_a_file_and_a_dict(run, tmp_path, capfd):
    rules = {"name": "strict", "rules": [{"metric": "kl_nats", "at_most": "0.000001 nats"}]}
    policy = tmp_path / "strict.yaml"
    policy.write_text(json.dumps(rules))
    verdict = qeval.gate(run, rules, junit=tmp_path / "junit.xml")
    assert verdict == qeval.gate(run.folder, policy) == qeval.gate(str(run.folder), str(policy))
    assert program(["gate", str(run.folder), "--policy", str(policy), "--json"]) == verdict.exit_code == 1
    assert json.loads(capfd.readouterr().out)["outcome"] == verdict.outcome == "fail"
    assert (tmp_path / "junit.xml").stat().st_size > 0
    assert "strict: fail" in str(verdict)
    assert "rtn:g32" in str(verdict)
    assert "<td>rtn:g32</td>" in verdict._repr_html_()
    assert [each.name for each in qeval.gate(run, rules, variants="rtn:g32").variants] == ["rtn:g32"]
    with pytest.raises(qeval.UsageError, match=r"'policy': .*rules"):
        qeval.gate(run, {"name": "empty", "rules": []})


def test_a_verdict_in_a_notebook_is_escaped(run):
    rules = {"name": "<b>odd</b>", "rules": [{"metric": "kl_nats", "at_most": "0.000001 nats"}]}
    html = qeval.gate(run, rules)._repr_html_()
    assert "<b>odd" not in html
    assert "&lt;b&gt;odd" in html


def test_a_diff_takes_runs_and_folders(place, run):
    found = qeval.diff(run, place.out)
    assert [each.a for each in found.variants] == NAMES
    assert found == qeval.diff(str(run.folder), place.out, variants=[f"{name}={name}" for name in NAMES])
    with pytest.raises(qeval.UsageError, match="--variant takes NAME or NAME_IN_A=NAME_IN_B"):
        qeval.diff(run, place.out, variants="=x")


def test_a_card_is_written_of_a_run(run, tmp_path):
    card = qeval.card(run, "awq:g32")
    assert "awq:g32" in card.card.read_text()
    assert all(path.is_file() for path in card.plots)


def test_a_variant_is_quantized_and_compared_by_its_path(place, tmp_path):
    made = qeval.quantize(str(place.model), method="rtn:g32", device="cpu", offline=True, out=tmp_path / "rtn")
    assert made.name == "rtn:g32"
    assert made.manifest.weights
    both = qeval.compare(
        str(place.model),
        **keywords(place, methods="rtn:g32", variants={"saved": made.folder}, tasks="kl", out=tmp_path / "out"),
    )
    assert both.metric("saved", "kl_nats") == both.metric("rtn:g32", "kl_nats")


def test_a_sweep_returns_its_runs_and_what_failed(place, tmp_path):
    models = [str(place.model), str(tmp_path / "nowhere")]
    options = keywords(place, methods=None, tasks="kl", out=None)
    done = qeval.sweep(models, out=tmp_path / "sweep", bits=[3, 4], groups="32", **{**options, "methods": "rtn"})
    assert [each.error is None for each in done.models] == [True, False]
    assert done.exit_code == 3
    (run,) = done.runs.values()
    assert [each.name for each in run.report.variants] == ["rtn:int3-g32", "rtn:int4-g32"]
    assert done.page.is_file()
    with pytest.raises(TypeError, match="windou"):
        qeval.sweep(models, out=tmp_path / "wrong", windou=64)
