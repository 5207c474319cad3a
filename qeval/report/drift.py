"""The section on greedy continuations."""

from qeval.report.document import Section, Table, TableCell, metric_cell
from qeval.report.measure_drift import REJOIN_TOKENS
from qeval.report.model import Report, VariantReport

_COLUMNS = {
    "drift_equal": "Tokens equal",
    "drift_diverged": "Prompts that diverge",
    "drift_first_tokens": "Tokens before",
    "drift_kl_nats": "KL there, nats",
    "drift_margin_nats": "Margin there, nats",
    "drift_rejoined": "Rejoins when forced",
}
_CHAT = "chat"
"""The corpus whose prompts are of many lengths."""
_NOTE = (
    "Tokens equal: each position after the baseline's own tokens. A free run diverges at the first that is not; tokens "
    "before: how many it shares with the baseline until then, all of them where it never leaves. KL is KL(baseline ‖ "
    "variant) there, the margin how much likelier the baseline's choice is to the baseline than the variant's: a small "
    f"one is a toss-up. Rejoins: with the baseline's token forced there, the next {REJOIN_TOKENS} are the baseline's "
    "again (of runs with as many left). Intervals resample prompts."
)


def drift_section(report: Report) -> Section | None:
    """Return the section of continuations; None where none were run."""
    record = report.drift
    if record is None:
        return None
    start = "BOS starts each" if record.bos else "no BOS"
    length = f"up to {record.prompt_tokens}" if record.corpus == _CHAT else f"{record.prompt_tokens}"
    sentence = (
        f"{record.prompts} prompts of {length} tokens of {record.corpus} ({start}), each continued "
        f"greedily by the baseline with {record.generated} tokens."
    )
    rows = tuple(_row(variant) for variant in report.variants)
    table = Table("Greedy continuations against the baseline's", ("Variant", *_COLUMNS.values()), rows, _NOTE)
    return Section("drift", "Greedy continuations", (sentence,), tables=(table,))


def _row(variant: VariantReport) -> tuple[TableCell, ...]:
    return TableCell(variant.name), *(metric_cell(variant.metrics.get(name)) for name in _COLUMNS)
