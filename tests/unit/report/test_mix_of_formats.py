"""The report of a mix of formats: every group's format in the tables and in the map, whatever their number."""

import pytest
from matplotlib.colors import to_rgba

from qeval.report import mix_tables, plots, style
from qeval.report.build import build_report
from qeval.report.explain.layers import layers_loss
from qeval.report.format_map import draw_formats
from qeval.report.model import Mix
from qeval.report.sections import report_sections
from qeval.store.run import GroupRecord
from tests.fixtures.runs import SEVEN, Shape, make_run

SMALL = Shape(variants=SEVEN[:4], windows=12, length=32)
BITS = {"nvfp4": 4, "int4-g128": 4, "mxfp6-e2m3-floor": 6, "fp8-tile128": 8, "float": 16}
KINDS = ("qkv", "o", "gate_up", "down")


def group(layer, place, name, measured=True):
    kls = {each: 0.01 * (place + 1) * 4.0 ** -BITS[each] for each in BITS if each != "float"} if measured else {}
    return GroupRecord(
        layer=layer, kind=KINDS[place], names=[f"{layer}.{place}"], parameters=1, bits=BITS[name], format=name,
        kl_low=kls.get("nvfp4"), kl_high=kls.get("fp8-tile128"), kls=kls,
    )  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    names = list(BITS)
    return [group(layer, place, names[(layer + place) % 5]) for layer in range(6) for place in range(4)]


@pytest.fixture(scope="module")
def report(tmp_path_factory, groups):
    plain = build_report(make_run(tmp_path_factory.mktemp("run"), SMALL))
    mixed = [
        variant.model_copy(update={"mix": Mix(importance="measured", budget_bits_per_weight=5.0, groups=groups)})
        for variant in plain.variants
        if variant.name == "mixed"
    ]
    return plain.model_copy(update={"variants": mixed})


def test_formats_come_by_their_bits_and_two_widths_have_none(groups):
    assert mix_tables.formats_of(groups) == ["int4-g128", "nvfp4", "mxfp6-e2m3-floor", "fp8-tile128", "float"]
    assert mix_tables.formats_of([group.model_copy(update={"format": None}) for group in groups]) == []


def test_the_table_has_every_layer_at_its_format(report, groups):
    table = mix_tables.mix_table(report.variants[0])
    assert table.columns == ("Linears", "int4-g128", "nvfp4", "mxfp6-e2m3-floor", "fp8-tile128", "float")
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["qkv"] == ["1", "0, 5", "2", "3", "4"]
    counts = [sum(group.format == name for group in groups) for name in table.columns[1:]]
    assert rows["all groups"] == [f"{count} of 24" for count in counts]


def test_the_most_sensitive_groups_have_a_kl_on_every_grid(report, groups):
    table = mix_tables.sensitive_table(report.variants[0])
    assert table.columns[1:-1] == tuple(f"KL alone in {name}, nats" for name in BITS if name != "float")
    first = next(group for group in groups if group.kind == "down")
    assert [cell.text for cell in table.rows[0]] == [
        f"Layer {first.layer} down", *(f"{kl:.3g}" for kl in first.kls.values()), first.format,
    ]  # fmt: skip
    assert len(table.rows) == 10


def test_predicted_mixes_have_no_table_of_sensitivities(report):
    unmeasured = [group(layer, 0, "nvfp4", measured=False) for layer in range(3)]
    mix = Mix(importance="fisher", budget_bits_per_weight=5.0, groups=unmeasured)
    assert mix_tables.sensitive_table(report.variants[0].model_copy(update={"mix": mix})) is None


def test_the_section_says_that_formats_were_given_out(report):
    section = next(each for each in report_sections(report, []) if each.id == "layers")
    assert section.title == "Where the bits went"
    assert section.sentences == (
        "mixed: formats given out by measured importance under a budget of 5 bits per weight.",
    )


def test_the_map_has_a_colour_and_a_mark_for_each_format_and_one_cell_a_group(report, groups):
    with style.styled():
        drawing = plots.layer_map(0, report.variants[0])
        figure = draw_formats(groups, mix_tables.formats_of(groups))
        grey, palette = style.grid(), [style.colour(place) for place in range(4)]
    assert drawing.name == "layers-1-mixed"
    assert "nvfp4 5, mxfp6-e2m3-floor 5" in drawing.alt
    assert drawing.alt.endswith("of 24 groups.")
    (axes,) = figure.axes
    (mesh,) = axes.collections
    assert [mesh.cmap(place) for place in range(5)] == [to_rgba(each) for each in (*palette, grey)]
    assert mesh.get_array().count() == 24
    marked = {line.get_marker(): len(line.get_xdata()) for line in axes.lines}
    assert len(marked) == 5
    assert sum(marked.values()) == 24
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == mix_tables.formats_of(groups)


def test_a_group_counts_at_its_format_and_float_loses_nothing():
    loss = layers_loss([group(0, 0, "fp8-tile128"), group(1, 0, "float"), group(2, 0, "nvfp4")], None)
    assert loss.sum_kl_nats == pytest.approx(0.01 * (4.0**-8 + 4.0**-4))
    assert loss.unmeasured == 0
    assert layers_loss([group(0, 0, "nvfp4", measured=False)], None) is None
