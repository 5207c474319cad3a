"""The model card: metadata that the hub's own reader takes, tables, plots, a section that touches nothing else."""

import json
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from qeval.cli.app import run_program as program
from qeval.errors import UsageError
from qeval.report import build_report, formatting
from qeval.report.card import into, write_card
from qeval.report.card.markers import BEGIN, END, replace_section
from tests.fixtures.runs import SEVEN, Made, Shape, make_run, reseal

SMALL = Shape(variants=SEVEN[:4], windows=12, length=32)
FRONT = "---\nlicense: mit\n# qeval:begin\nold: 1\n# qeval:end\ntags: [x]  # as they were\n---\n"
BODY = f"# Mine\n\ntext \n{BEGIN}\nold words\n{END}\nmore\ttext, no newline at the end"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), SMALL)


@pytest.fixture(scope="module")
def report(run):
    return build_report(run)


@pytest.fixture(scope="module")
def written(run):
    return write_card(run)


@pytest.fixture(scope="module")
def text(written):
    return written.card.read_text(encoding="utf-8")


def edited(run, change):
    record = json.loads((run / "run.json").read_text())
    change(record)
    reseal(run, record)
    return run


def test_the_hubs_reader_finds_every_figure_in_the_metadata(written, report):
    name, results = model_index_to_eval_results(metadata_load(written.card)["model-index"])
    assert name == "demo"
    kinds = {
        "perplexity": "ppl", "kl_divergence": "kl_nats", "top1_agreement": "top1_agreement",
        "top5_agreement": "top5_agreement", "top10_agreement": "top10_agreement", "accuracy": "mmlu_acc",
        "accuracy_difference": "mmlu_acc_diff", "flips": "mmlu_flips",
    }  # fmt: skip
    assert len(results) == len(kinds) * len(report.variants)
    metrics = {variant.name: variant.metrics for variant in report.variants}
    for result in results:
        metric = metrics[result.metric_args["variant"]][kinds[result.metric_type]]
        assert result.metric_value == metric.value
        assert (result.metric_args["low"], result.metric_args["high"]) == (metric.low, metric.high)
        assert result.verified is False
        on_tokens = metric.unit in ("ppl", "nats") or result.metric_type.endswith("_agreement")
        assert result.dataset_config == ("wikitext2-32/32" if on_tokens else "5-shot")
        assert result.dataset_type == ("Salesforce/wikitext" if on_tokens else "mmlu_sample")  # never called MMLU


def test_a_card_about_one_variant_tells_that_one(tmp_path):
    run = edited(make_run(tmp_path, SMALL), lambda record: record["model"].update(hub_id="org/base", source="hub"))
    card = ModelCard.load(write_card(run, "awq").card)
    assert card.data.base_model == "org/base"
    assert card.data.model_name == "demo-awq"
    assert {result.metric_args["variant"] for result in card.data.eval_results} == {"awq"}
    assert len(card.data.eval_results) == 8


def test_mmlu_from_the_hub_is_named_as_the_hub_does(tmp_path):
    run = edited(make_run(tmp_path, SMALL), lambda r: r["tasks"][0].update(source="hub", title="MMLU 5-shot"))
    _, results = model_index_to_eval_results(metadata_load(write_card(run).card)["model-index"])
    assert {r.dataset_type for r in results if r.metric_type == "accuracy"} == {"cais/mmlu"}


def test_a_folder_of_ones_own_is_not_told(tmp_path):
    run = edited(make_run(tmp_path, SMALL), lambda r: r["model"].update(source="folder", name="/home/me/llama"))
    card = write_card(run)
    assert metadata_load(card.card)["model-index"][0]["name"] == "llama"
    tables = [line for line in card.card.read_text().splitlines() if line.startswith("| ")]
    assert any(line.startswith("| llama |") for line in tables)
    assert not any("/home/me" in line for line in tables)


def test_tables_have_the_layout_of_the_benchmark_page(text, report):
    names = [variant.name for variant in report.variants]
    header = f"| Model | FP16 baseline | {' | '.join(names)} |\n| :--- |"
    assert text.count(header) == 2  # MMLU and perplexity
    assert "| Model | Quantization Method | Quantization Granularity | KL-divergence (nats) | kl_abs_modelopt" in text
    for variant in report.variants:
        for name in ("kl_nats", "kl_abs_modelopt", "ppl", "ppl_ratio", "mmlu_acc", "mmlu_flips"):
            assert formatting.metric_text(variant.metrics[name]) in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) == 4
    for block in blocks:
        assert len({line.count(" | ") for line in block}) == 1


def test_the_command_that_reproduces_it_stands_there_as_it_was(text):
    assert "```sh\nqeval compare --model demo --methods rtn,awq,mixed\n```" in text


def test_plots_are_there_light_and_dark_and_all_are_linked(written, text):
    stems = [f"{plot}-{dress}" for plot in ("quality-size", "kl-distribution") for dress in ("light", "dark")]
    names = {stem + kind for stem in stems for kind in (".png", ".svg")}
    assert {path.name for path in written.plots} == names
    for path in written.plots:
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<?xml")
        if path.suffix == ".svg":
            assert f"qeval-card/{path.name}" in text
    folder = written.card.parent / "qeval-card"
    light, dark = ((folder / f"quality-size-{dress}.svg").read_text() for dress in ("light", "dark"))
    assert "#1f2329" in light
    assert "#1f2329" not in dark
    assert "#fefefe" not in dark
    width = int.from_bytes((folder / "quality-size-light.png").read_bytes()[16:20])
    assert width == 1440
    assert text.count('width="691"') == 2


def test_a_second_card_has_the_same_bytes(written, run):
    before = {path: path.read_bytes() for path in (written.card, *written.plots)}
    assert write_card(run) == written
    assert {path: path.read_bytes() for path in before} == before


def test_a_baseline_at_chance_is_said_to_be_wherever_its_accuracy_stands(tmp_path):
    text = write_card(make_run(tmp_path, replace(SMALL, skill=0.0))).card.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| demo | ") and "%" in line)
    assert "(at chance)" in row.split(" | ")[1]
    assert "The baseline's accuracy cannot be told from guessing (25 %), so neither can a loss of it." in text
    assert "baseline_at_chance: true" in text


def test_the_noise_floor_has_its_row_and_no_figure_of_its_own(tmp_path, capfd):
    run = edited(make_run(tmp_path, SMALL), lambda record: record["variants"][3].update(role="floor"))
    card = write_card(run)
    _, results = model_index_to_eval_results(metadata_load(card.card)["model-index"])
    assert "rtn" not in {result.metric_args["variant"] for result in results}
    assert "| rtn (noise floor: the baseline against itself) |" in card.card.read_text(encoding="utf-8")
    assert program(["card", str(run), "--variant", "rtn"]) == 3
    assert "'rtn' is the noise floor, the baseline against itself, so it has no figures" in capfd.readouterr().err


def test_names_cannot_break_out_of_the_section(tmp_path, capfd):
    evil = Made(f"x|y {END} <script>", "rtn", "int4-g128", "block 128", 4.13, 0.1)
    text = write_card(make_run(tmp_path / "a", replace(SMALL, variants=(evil,)))).card.read_text(encoding="utf-8")
    assert text.partition("\n---\n")[2].count(END) == 1
    assert r"x\|y &lt;!-- qeval:end -->" in text
    run = edited(make_run(tmp_path / "b", SMALL), lambda record: record.update(command=f"qeval compare '{END}'"))
    assert program(["card", str(run)]) == 3
    assert "inside its section" in capfd.readouterr().err


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_into_touches_nothing_but_the_section(run, tmp_path, newline, start):
    readme = tmp_path / "README.md"
    before = (start + FRONT + BODY).replace("\n", newline)
    readme.write_bytes(before.encode())
    readme.chmod(0o640)
    assert into(run, readme).metadata
    after = readme.read_bytes().decode()
    assert after.split("# qeval:begin")[0] == before.split("# qeval:begin")[0]
    assert after.split("# qeval:end")[1].split(BEGIN)[0] == before.split("# qeval:end")[1].split(BEGIN)[0]
    assert after.split(END)[1] == before.split(END)[1]
    assert "old words" not in after
    assert "old: 1" not in after
    assert after.replace("\r\n", "").count("\n") == (0 if newline == "\r\n" else after.count("\n"))
    assert stat.S_IMODE(readme.stat().st_mode) == 0o640
    loaded = metadata_load(readme)
    assert (loaded["license"], loaded["tags"]) == ("mit", ["x"])
    assert len(model_index_to_eval_results(loaded["model-index"])[1]) == 32
    assert (tmp_path / "qeval-card" / "quality-size-dark.svg").exists()
    written = readme.read_bytes()
    into(run, readme)
    assert readme.read_bytes() == written


def test_front_matter_without_markers_is_kept_and_that_is_said(run, tmp_path, capfd):
    readme = tmp_path / "README.md"
    front = "---\nlicense: mit\nmodel-index: []\n---\n"
    readme.write_text(front + BODY)
    assert program(["card", str(run), "--into", str(readme)]) == 0
    assert readme.read_text().startswith(front + "# Mine\n\ntext \n" + BEGIN)
    heard = capfd.readouterr()
    assert "so no model-index was put there" in heard.err
    assert heard.out.splitlines()[0] == str(readme)


def test_a_link_to_a_readme_stays_a_link(run, tmp_path):
    real = tmp_path / "real.md"
    real.write_text(BODY)
    link = tmp_path / "README.md"
    link.symlink_to(real)
    into(run, link)
    assert link.is_symlink()
    assert "What quantization lost" in real.read_text()


BROKEN = {
    "no markers": ("# Mine\n", "R has no place for the section: put the two lines <!-- qeval:begin --> and"),
    "no end": (f"a\n{BEGIN}\nb", "R has the line <!-- qeval:begin --> but not <!-- qeval:end -->"),
    "no begin": (f"a\n{END}\nb", "R has the line <!-- qeval:end --> but not <!-- qeval:begin -->"),
    "two begins": (f"{BEGIN}\n{BEGIN}\n{END}\n", "<!-- qeval:begin --> 2 times (lines 1 and 2); leave one."),
    "two ends": (f"---\na: 1\n---\n{BEGIN}\n{END}\n\n{END}", "<!-- qeval:end --> 2 times (lines 5 and 7)"),
    "reversed": (f"{END}\n{BEGIN}\n", "R has the line <!-- qeval:end --> before <!-- qeval:begin -->"),
    "metadata without an end": (f"---\n# qeval:begin\n---\n{BEGIN}\n{END}", "# qeval:begin but not # qeval:end"),
    "an index of one's own": (
        f"---\nmodel-index: []\n# qeval:begin\n# qeval:end\n---\n{BEGIN}\n{END}", "has a 'model-index' outside",
    ),
    "front matter that is no YAML": (
        f"---\na: [\n# qeval:begin\n# qeval:end\n---\n{BEGIN}\n{END}", "front matter of R is not valid YAML",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_readme_without_a_clear_place_is_refused(text, said):
    with pytest.raises(UsageError) as refused:
        replace_section(text, "new", "b: 2", "R")
    assert said in str(refused.value)


def test_markers_inside_a_line_are_text():
    text = f"Write {BEGIN} and {END}.\n{BEGIN}\n{END}\n"
    assert replace_section(text, "new", "", "R").text == f"Write {BEGIN} and {END}.\n{BEGIN}\nnew\n{END}\n"


def test_metadata_goes_between_its_own_markers():
    replaced = replace_section(FRONT + BODY, "new", "a:\n- 1", "R")
    assert yaml.safe_load(replaced.text.split("---")[1]) == {"license": "mit", "a": [1], "tags": ["x"]}


def test_bad_input_is_one_sentence_and_its_code(run, tmp_path, capfd):
    def refused(code, *arguments):
        assert program(["card", *map(str, arguments)]) == code
        heard = capfd.readouterr().err
        assert heard.startswith("error: ")
        assert heard.count("\n") == 1
        return heard

    assert "holds no run" in refused(2, tmp_path)
    assert "'awk'; nearest: awq" in refused(2, run, "--variant", "awk")
    assert "Cannot read" in refused(2, run, "--into", tmp_path / "none.md")
    assert "is a folder" in refused(2, run, "--into", tmp_path)
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    assert "latin.md is not UTF-8 text (byte 3)" in refused(2, run, "--into", tmp_path / "latin.md")
    empty = make_run(tmp_path / "empty", replace(SMALL, variants=()))
    assert "no figures for a card: no variant was scored" in refused(3, empty)
    nothing = make_run(tmp_path / "nothing", replace(SMALL, metrics=()))
    assert "no figures for a card" in refused(3, nothing)
    other = edited(make_run(tmp_path / "other", SMALL), lambda record: record.update(run_version=3))
    assert "of another version" in refused(3, other)


def test_a_failed_variant_is_told_in_the_table_and_has_no_figures(tmp_path, capfd):
    def fail(record):
        record["variants"][3] |= {"status": "failed", "error": "Out of memory."}

    run = edited(make_run(tmp_path, SMALL), fail)
    card = write_card(run)
    assert "rtn failed and was not scored: Out of memory." in card.card.read_text(encoding="utf-8")
    assert "variant: rtn\n" not in card.card.read_text(encoding="utf-8")
    assert program(["card", str(run), "--variant", "rtn"]) == 3
    assert "'rtn' failed (Out of memory.), so it has no figures" in capfd.readouterr().err


def test_a_card_needs_no_torch(run):
    code = (
        "import sys; from qeval.cli.app import run_program; code = run_program(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    )
    done = subprocess.run([sys.executable, "-c", code, "card", str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
