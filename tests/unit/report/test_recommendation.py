"""What a report recommends, by case; the ranking below it; names and ticks of its chart."""

import re

import pytest
from matplotlib.path import Path

from qeval.report import build_report, style
from qeval.report.plot_labels import label_points, plain_ticks
from qeval.report.plots import quality_against_size
from qeval.report.ranking import ranking
from qeval.report.recommendation import CLOSE, recommend
from tests.fixtures.runs import SEVEN, Shape, make_run

MB = 10**6


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    report = build_report(make_run(tmp_path_factory.mktemp("run"), Shape(variants=SEVEN[:1], windows=4, length=16)))
    return report.model_copy(update={"model": report.model.model_copy(update={"source": "hub"}), "warnings": []})


def metric(value, low, high, unit="nats"):
    return {"value": value, "low": low, "high": high, "unit": unit, "better": "lower", "n": 64, "clusters": 4}


def report_of(template, rows, **update):
    """A report of rows: name, size in MB, KL with interval, interval of the accuracy's difference, other fields."""
    variants = []
    for name, size, kl, accuracy, fields in rows:
        metrics = {"kl_nats": metric(*kl)} if kl else {}
        if accuracy:
            metrics["mmlu_acc_diff"] = metric(sum(accuracy) / 2, *accuracy, unit="fraction")
        content = template.variants[0].model_dump() | {"pareto": True, "mix": None, "kl_curve": None, "tasks": {}}
        content |= {"name": name, "size_bytes": int(size * MB), "metrics": metrics, **fields}
        variants.append(type(template.variants[0]).model_validate(content))
    return template.model_copy(update={"variants": variants, **update})


def row(name, size, kl=None, accuracy=(-0.01, 0.01), **fields):
    return name, size, kl, accuracy, fields


BEST = row("big", 160, (0.010, 0.009, 0.011))
NEAR = row("near", 120, (0.012, 0.011, 0.0149))
FAR = row("far", 90, (0.5, 0.4, 0.6))


def test_the_smallest_whose_kl_is_close_is_recommended(template):
    chosen, sentences = recommend(report_of(template, [BEST, NEAR, FAR]))
    assert chosen == "near"
    assert sentences[0].startswith("Ship near: at 120 MB (")
    assert f"at most {CLOSE:g} times the lowest, 0.0100 of big (160 MB)" in sentences[0]
    assert "far is smaller (90 MB), but its KL, 0.500 [0.400, 0.600] nats, is not shown to be within" in sentences[1]
    assert "No loss of accuracy is resolved (MMLU-style sample 5-shot 0.0 pts [−1.0, +1.0])" in sentences[1]
    assert len(sentences) == 2


@pytest.mark.parametrize("high", [0.0151, None])
def test_a_kl_that_may_be_higher_or_has_no_interval_is_not_close(template, high):
    wide = row("near", 120, (0.012, None if high is None else 0.011, high))
    chosen, sentences = recommend(report_of(template, [BEST, wide]))
    assert chosen == "big"
    assert sentences[0].startswith("Ship big: it has the lowest KL, 0.0100 [0.0090, 0.0110] nats, at 160 MB")
    assert "near is smaller (120 MB)" in sentences[1]


def test_of_sizes_that_are_equal_the_lowest_kl_decides(template):
    worse = row("worse", 119.5, (0.0125, 0.011, 0.0149))
    assert recommend(report_of(template, [BEST, NEAR, worse])).variant == "near"
    chosen, sentences = recommend(report_of(template, [NEAR, row("worse", 119.5, (0.02, 0.019, 0.021))]))
    assert (chosen, "no smaller variant was measured" in sentences[1]) == ("near", True)


def test_a_kl_no_higher_than_the_noise_floor_is_close(template):
    floor = row("baseline@fp32", 269, (0.7, 0.6, 0.8), role="floor")
    chosen, sentences = recommend(report_of(template, [BEST, FAR, floor]))
    assert chosen == "far"
    assert sentences[0].endswith("is no higher than the noise floor.")


def test_a_resolved_loss_of_accuracy_above_the_noise_floors_rules_out(template):
    lossy = row("near", 120, (0.012, 0.011, 0.0149), (-0.05, -0.01))
    chosen, sentences = recommend(report_of(template, [BEST, lossy]))
    assert chosen == "big"
    assert (
        "near is smaller (120 MB), but loses accuracy (MMLU-style sample 5-shot −3.0 pts [−5.0, −1.0])" in sentences[1]
    )

    floor = row("baseline@fp32", 269, (1e-6, 0.0, 2e-6), (-0.08, -0.02), role="floor")
    assert recommend(report_of(template, [BEST, lossy, floor])).variant == "near"
    at_chance = [task.model_copy(update={"baseline_at_chance": True}) for task in template.tasks]
    chosen, sentences = recommend(report_of(template, [BEST, lossy], tasks=at_chance))
    assert chosen == "near"
    assert sentences[1].startswith("Accuracy decides nothing, since the baseline's cannot be told from guessing")


def test_accuracy_that_was_not_measured_is_said(template):
    report = report_of(
        template, [row("a", 100, (0.1, 0.09, 0.11), None), row("b", 90, (1.0, 0.9, 1.1), None)], tasks=[]
    )
    assert recommend(report).sentences[1].startswith("Accuracy was not measured; b is smaller (90 MB), but")


VOID = {"void": "calibrated on it"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no variant was scored"),
        ([row("a", 1, (0.1, 0.1, 0.1), **VOID), row("b", 2, (0.2, 0.2, 0.2), **VOID)], "every variant is void"),
        ([row("a", 1, (None, None, None)), row("b", 2, (0.2, 0.1, 0.3), status="broken")], "has a finite KL"),
        ([BEST], "only one variant"),
        ([BEST, row("a", 1, (None, None, None), status="broken")], "only one variant"),
        ([BEST, row("big@ort", 160, (0.010, 0.009, 0.011), twin="big", backend="ort")], "only one variant"),
        ([BEST, row("big@weights", 160, (0.001, 0.001, 0.001), role="part")], "only one variant"),
        ([row("a", 1, (0.1, None, None)), row("b", 2, (0.2, None, None))], "no intervals"),
        ([row("a", 1, (0.1, 0.1, 0.1), (-0.3, -0.2)), row("b", 2, (0.2, 0.2, 0.2), (-0.3, -0.2))], "loses accuracy"),
    ],
)  # fmt: skip
def test_where_the_run_settles_nothing_the_reason_is_said(template, rows, reason):
    chosen, sentences = recommend(report_of(template, rows))
    assert chosen is None
    assert len(sentences) == 1
    assert sentences[0].startswith("Nothing is recommended: ")
    assert reason in sentences[0]


def test_without_kl_nothing_is_recommended(template):
    report = report_of(template, [row("a", 1), row("b", 2)], metrics_asked=["ppl", "mmlu"])
    assert recommend(report).sentences == (
        "Nothing is recommended: the run measured no KL, by which variants are chosen.",
    )


def test_the_demo_model_is_no_guide_to_methods(template):
    demo = template.model.model_copy(update={"source": "demo"})
    assert "choose no method by it" in recommend(report_of(template, [BEST, NEAR], model=demo)).sentences[2]


def test_the_ranking_has_a_row_a_variant_by_loss_with_the_kernels_of_other_backends(template):
    kernel = row("near@ort", 120, (0.02, 0.01, 0.03), twin="near", backend="ort")
    floor = row("baseline@ort", 269, (1e-6, 5e-7, 2e-6), role="floor", backend="ort")
    report = report_of(template, [FAR, row("void", 80, (0.001, 0.001, 0.001), **VOID), floor, NEAR, kernel, BEST])
    report.variants[4].metrics["kernel_kl_nats"] = (
        report.variants[4].metrics["kl_nats"].model_copy(update={"value": 0.004, "low": 0.003, "high": 0.005})
    )
    table = ranking(report, "near")
    assert table.columns[:4] == ("Variant", "KL, nats", "Size", "Bits/weight")
    assert table.columns[-1] == "Kernel, ort, nats"
    assert [cells[0].text for cells in table.rows] == ["FP16 baseline", "big", "near", "far", "void"]
    assert [cells[0].remark for cells in table.rows] == [
        None, None, "recommended", None, "void: calibrated on what it was scored on",
    ]  # fmt: skip
    assert [cells[-1].text for cells in table.rows] == ["–", "–", "0.00400", "–", "–"]
    assert table.rows[2][-1].interval == "[0.00300, 0.00500]"
    assert table.note.startswith("Noise floor (baseline@ort): KL 0.000001")


def test_the_chart_names_its_points_and_its_floor_and_has_plain_ticks(template):
    floor = row("baseline@ort", 269, (1e-6, 5e-7, 2e-6), role="floor")
    with style.styled():
        figure = quality_against_size(report_of(template, [BEST, NEAR, FAR, floor])).figure
        near_floor = quality_against_size(report_of(template, [BEST, NEAR, row("b", 269, (0.02, 0, 1), role="floor")]))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["noise floor 0.000001, below", "big", "near", "far"]
    assert figure.legends == []
    assert all(re.fullmatch(r"0\.\d+|1", label.get_text()) for label in axes.get_yticklabels())
    assert [text.get_text() for text in near_floor.figure.axes[0].texts] == ["noise floor 0.02", "big", "near"]
    assert "The noise floor is 0.02 nats" in near_floor.alt


def test_names_without_room_leave_the_legend(template):
    crowd = [row(f"a-rather-long-name-{place}", 100 + place / 1000, (0.1, 0.09, 0.11)) for place in range(12)]
    with style.styled():
        drawing = quality_against_size(report_of(template, crowd))
    assert list(drawing.figure.axes[0].texts) == []
    assert len(drawing.figure.legends[0].get_texts()) == 13


def test_names_keep_off_one_another_and_off_lines():
    with style.styled():
        figure, axes = style.figure(3)
        axes.set(xlim=(0, 10), ylim=(0, 10))
        points = [(5.0, 5.0, "first"), (5.0, 5.6, "second"), (9.9, 9.9, "corner")]
        assert label_points(figure, axes, points, [Path([(5, 5), (10, 5)])])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(box.count_overlaps(boxes[place + 1 :]) for place, box in enumerate(boxes))
    line = axes.transData.transform_path(Path([(5, 5), (10, 5)]))
    assert not any(line.intersects_bbox(box, False) for box in boxes)
    inside = axes.get_window_extent()
    assert all(inside.x1 >= box.x1 and inside.y1 >= box.y1 for box in boxes)


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((0.09, 0.7), ["0.1", "0.2", "0.5"]),
        ((0.0008, 1.5), ["0.001", "0.01", "0.1", "1"]),
        ((1e-9, 1.5), ["10⁻⁹", "10⁻⁷", "10⁻⁵", "10⁻³", "10⁻¹"]),
        ((0.11, 0.14), ["0.11", "0.12", "0.13", "0.14"]),
    ],
)
def test_a_logarithmic_axis_has_few_round_plain_ticks(limits, labels):
    figure, axes = style.figure(3)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    plain_ticks(axes.yaxis)
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert axes.yaxis.get_minorticklocs().size == 0
