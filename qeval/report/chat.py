"""The section on the baseline's answers to prompts, and the sentences on what limits them."""

from collections.abc import Iterator

from qeval.report import formatting
from qeval.report.conventions import RATIO
from qeval.report.document import Section, Table, TableCell, metric_cell
from qeval.report.model import GroupedBy, Report
from qeval.store.run import ChatRecord

_COLUMNS = {"kl_nats": "KL, nats", "top1_agreement": "Same top token", "ppl_ratio": RATIO}
_WHOLE = {
    "chat_kl_nats": "KL, nats",
    "chat_kl_nats_p99": "p99 of KL, nats",
    "chat_top1_agreement": "Same top token",
    "chat_ppl_ratio": RATIO,
}
_TITLES: dict[GroupedBy, tuple[str, str]] = {
    "kind": ("By kind of prompt", "Kind"),
    "language": ("By language of the prompt", "Language"),
    "part": ("By part of the answer", "Part"),
    "token": ("By place in the answer", "Tokens"),
}
_NOTE = (
    "Each answer is the baseline's own, under its chat template; variants are asked for the probabilities of its "
    "tokens, and generate nothing. Intervals resample conversations; that of the mean over languages, languages."
)


def chat_section(report: Report) -> Section | None:
    """Return the section of answers; None where no prompt was answered."""
    chat = report.protocol and report.protocol.chat
    if not chat or not answer_metrics(report):
        return None
    rows = tuple((TableCell(v.name), *(metric_cell(v.metrics.get(name)) for name in _WHOLE)) for v in report.variants)
    whole = Table("On the baseline's answers", ("Variant", *_WHOLE.values()), rows, _NOTE)
    return Section("chat", "Chat", (_scope(chat),), tables=(whole, *_group_tables(report)))


def chat_notes(chat: ChatRecord) -> list[str]:
    """Return sentences on what was left out, was cut, or is in pieces that no reader would call tokens."""
    unfinished = sum(not answer.ended for answer in chat.answers)
    sentences = []
    if unfinished:
        sentences.append(
            f"Chat: {unfinished} of {len(chat.answers)} answers reached the limit of {chat.longest_answer} tokens and "
            "are cut there; --chat-tokens raises it."
        )
    if chat.prompts_with_tools_left_out:
        sentences.append(
            "Chat: the chat template takes no tools, so prompts with tools are left out "
            f"({chat.prompts_with_tools_left_out} of them)."
        )
    if chat.in_bytes:
        shares = [f"{language} ({formatting.percent(share)})" for language, share in chat.in_bytes.items()]
        sentences.append(
            f"Chat: the tokenizer breaks characters of {formatting.listed(shares)} into bytes (share of the prompts' "
            "tokens that are parts of characters), so a token says less there than elsewhere."
        )
    return sentences


def _scope(chat: ChatRecord) -> str:
    how = "greedily" if chat.temperature == 0 else f"by sampling at temperature {chat.temperature:g}"
    template = "its own chat template" if chat.template is None else f"the chat template of {chat.template}"
    shipped = {"shipped": "shipped prompts", "parallel": "shipped prompts (the same in ten languages)"}
    prompts = shipped.get(chat.source, f"prompts of {chat.source}")
    return (
        f"The baseline answered {chat.prompts} {prompts} {how} under {template} ({len(chat.answers)} answers of up to "
        f"{chat.longest_answer} tokens), and every variant was scored on its answers' tokens alone."
    )


def _group_tables(report: Report) -> Iterator[Table]:
    for by, (title, column) in _TITLES.items():
        rows = [
            (TableCell(v.name), TableCell(group.name), *(metric_cell(group.metrics.get(name)) for name in _COLUMNS))
            for v in report.variants
            for group in v.chat
            if group.by == by
        ]
        if rows:
            yield Table(title, ("Variant", column, *_COLUMNS.values()), tuple(rows))


def answer_metrics(report: Report) -> dict[str, str]:
    """Return the titles of the metrics of answers that a report has, by name."""
    return {name: title for name, title in _WHOLE.items() if any(name in v.metrics for v in report.variants)}
