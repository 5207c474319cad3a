"""`write_card` makes a card of its own in the run's folder; `into` puts its section into a README that is there."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard

from qeval import escape
from qeval.errors import UsageError
from qeval.files.atomic import write_bytes, write_output, write_text
from qeval.paths import check_file, check_place
from qeval.report import Report, build_report
from qeval.report.card.markers import BEGIN, END, replace_section
from qeval.report.card.plots import FOLDER, Pair, card_plots
from qeval.report.card.results import base_model, chosen, metadata, model_name
from qeval.report.card.section import card_section
from qeval.report.model import VariantReport


class Written(NamedTuple):
    """The card's file, its plots, and whether its front matter holds the figures."""

    card: Path
    plots: list[Path]
    metadata: bool


class _Parts(NamedTuple):
    """A card's parts before they have a place."""

    report: Report
    variants: list[VariantReport]
    section: str
    plots: list[Pair]


def write_card(run_dir: Path, variant: str | None = None, folder: Path | None = None) -> Written:
    """Write the card of a run to README.md in a folder, with metadata and plots.

    Args:
        run_dir: The run's folder.
        variant: The one that the metadata is about; None means all that are sound.
        folder: Where the card goes; None means RUN/card.

    Raises:
        UsageError: `run_dir` holds no run, or the run has no such variant.
        BrokenRecordError, QevalError: as `report.build`, and where there are no figures.
    """
    path = (folder or run_dir / "card") / "README.md"
    if run_dir.is_dir() and folder is None:
        check_place(path.parent, "the card", "the run's folder")
    parts = _parts(run_dir, variant)
    name = model_name(parts.report)
    title = escape.escape_markdown(name if variant is None else f"{name}, {variant}")
    front = metadata(parts.report, parts.variants, **base_model(parts.report)).to_yaml()
    text = f"---\n{front}\n---\n\n# {title}\n\n{BEGIN}\n{parts.section}{END}\n"
    write_text(path, str(ModelCard(text)))
    return Written(path, _write_plots(path.parent, parts.plots), True)


def into(run_dir: Path, readme: Path, variant: str | None = None) -> Written:
    """Replace the section between the markers of `readme`, and nothing else; its plots go next to it.

    Raises:
        UsageError: as `write_card`, and where `readme` can't be read or has no place for the section.
    """
    check_file(readme, "--into")
    before = _read(readme)
    check_place(readme.parent / FOLDER, "the plots", "--into")
    parts = _parts(run_dir, variant)
    index = metadata(parts.report, parts.variants).to_yaml()
    after = replace_section(before, parts.section, index, str(readme))
    if after.text != before:
        write_output(readme, after.text)
    return Written(readme, _write_plots(readme.parent, parts.plots), after.metadata)


def _parts(run_dir: Path, variant: str | None) -> _Parts:
    report = build_report(run_dir)
    variants = chosen(report, variant)
    plots = card_plots(report)
    return _Parts(report, variants, card_section(report, plots), plots)


def _read(readme: Path) -> str:
    try:
        return readme.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"Cannot read {readme}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{readme} is not UTF-8 text (byte {error.start}).") from error


def _write_plots(folder: Path, plots: list[Pair]) -> list[Path]:
    written = []
    for pair in plots:
        for name, data in pair.files().items():
            written.append(folder / FOLDER / name)
            write_bytes(written[-1], data)
    return written
