"""The sections on chains of thought and on calls of functions, and the sentences on what limits them."""

from collections.abc import Iterator, Mapping

from qeval.report import formatting
from qeval.report.document import NOTHING, Section, Table, TableCell, metric_cell
from qeval.report.model import Metrics, Report
from qeval.report.tables import baseline_name
from qeval.store.run import RunRecord
from qeval.store.trace_records import GrammarRecord, ReasoningRecord

_REASONING = {
    "reasoning_kl_nats": "KL along chains, nats",
    "reasoning_answer_nll_diff": "NLL of the answer, minus the baseline's",
    "reasoning_acc": "Right",
    "reasoning_flips": "Flips",
    "reasoning_length_ratio": "Length ratio",
    "reasoning_unfinished": "Thinks on",
    "reasoning_doubt": "Doubt",
    "reasoning_doubt_ratio": "Doubt ratio",
}
_GRAMMAR = {
    "grammar_leak": "Leak a token",
    "grammar_valid": "Valid along the baseline's calls",
    "grammar_valid_diff": "Minus the baseline's",
    "grammar_valid_own": "Valid, of its own",
}
_RARE = 0.05
"""A probability of a valid call below which its mean over calls is too skewed to be trusted."""
_SIGNED = ("reasoning_answer_nll_diff", "grammar_valid_diff")
_REASONING_NOTE = (
    "Right: behind the chain and the words before the answer, each token of the right answer is the likeliest, and no "
    "word or number would go on. Flips: answers that became right or wrong. Length ratio: how long a sampled chain "
    "would be, up to the length of the baseline's, over the baseline's. Thinks on: the probability of not having "
    "stopped where the baseline ended its chain. Doubt: the mean probability of {doubt} at a token. Intervals resample "
    "questions."
)
_GRAMMAR_NOTE = (
    "Leak: the probability of all tokens that the grammar of the prompt's tools forbids. Valid: the product of 1 - "
    "leak over a call; for the baseline its probability of a valid call once it begins one, for a variant the same "
    "along the baseline's calls. Valid, of its own: the calls weighted by the variant's probability over the "
    "baseline's; wide where they differ much. Intervals resample prompts."
)


def trace_sections(report: Report) -> Iterator[Section]:
    """Yield the sections of the tasks along traces that were run."""
    if report.reasoning:
        doubt = formatting.listed(report.reasoning.doubt) if report.reasoning.doubt else "no marker"
        table = _table(
            report, "Along the baseline's chains of thought", _REASONING, _REASONING_NOTE.format(doubt=doubt)
        )
        yield Section("reasoning", "Replayed reasoning", (_chains(report.reasoning),), tables=(table,))
    if report.grammar:
        table = _table(report, "Along the baseline's calls of functions", _GRAMMAR, _GRAMMAR_NOTE)
        yield Section("grammar", "Grammar leak", (_calls(report.grammar),), tables=(table,))


def trace_metrics(report: Report) -> dict[str, str]:
    """Return the titles of the metrics along traces that a report has, by name."""
    titles = {**_REASONING, **_GRAMMAR}
    return {name: title for name, title in titles.items() if any(name in v.metrics for v in report.variants)}


def trace_notes(run: RunRecord) -> list[str]:
    """Return sentences on traces that were cut, and on what could not be looked for."""
    sentences = []
    if run.reasoning and (cut := sum(not trace.ended for trace in run.reasoning.traces)) and run.reasoning.thinks:
        sentences.append(
            f"Reasoning: {cut} of {run.reasoning.questions} chains reached the limit of {run.reasoning.longest_chain} "
            "tokens and are closed there; --reasoning-tokens raises it."
        )
    if run.reasoning and not run.reasoning.doubt:
        sentences.append("Reasoning: no marker of doubt is one token of this tokenizer, so doubt is not told.")
    if run.grammar and (cut := sum(not trace.ended for trace in run.grammar.traces)):
        sentences.append(
            f"Grammar: {cut} of {len(run.grammar.traces)} calls reached the limit of {run.grammar.longest_call} tokens "
            "and count as not valid; --chat-tokens raises it."
        )
    if run.grammar and run.grammar.prompts_left_out:
        sentences.append(
            f"Grammar: {run.grammar.prompts_left_out} prompts are left out: they have no tools, more than one answer, "
            "no message of the user last, or lie behind the limit."
        )
    return sentences


def weak_baseline_notes(baseline: Metrics) -> list[str]:
    """Return sentences on a baseline that answers or calls too badly for a loss to be seen."""
    sentences = []
    if (right := baseline.get("reasoning_acc")) and right.value == 0:
        sentences.append(
            f"Reasoning: the baseline has none of {right.n} answers right, so none can be lost; the KL and the NLL of "
            "answers still say what changed."
        )
    if (valid := baseline.get("grammar_valid")) and valid.value is not None and valid.value < _RARE:
        sentences.append(
            f"Grammar: the baseline's calls are seldom valid ({formatting.metric_text(valid)}). Few of them carry most "
            "of such a mean, so it and its interval may be too low; the leak a token still says what changed."
        )
    return sentences


def _chains(record: ReasoningRecord) -> str:
    source = "shipped questions" if record.source == "shipped" else f"questions of {record.source}"
    kind = "thought" if record.thinks else "answered (its chat template has no markers of thinking)"
    return (
        f"The baseline {kind} about {record.questions} {source}, greedily, with up to {record.longest_chain} tokens; "
        f"its chain was forced on every model, then the right answer behind its own words, where it gives it "
        f"({record.in_own_words}), else behind '{record.cue}'."
    )


def _calls(record: GrammarRecord) -> str:
    source = "shipped prompts" if record.source == "calls" else f"prompts of {record.source}"
    return (
        f"The baseline sampled {record.calls} calls for each of {record.prompts} {source}, of up to "
        f"{record.longest_call} tokens, within the grammar of the prompt's tools (masks by {record.engine}); every "
        "model was asked for its probabilities along them."
    )


def _table(report: Report, title: str, columns: Mapping[str, str], note: str) -> Table:
    models = {baseline_name(report): report.baseline.metrics, **{v.name: v.metrics for v in report.variants}}
    shown = [name for name in columns if any(name in metrics for metrics in models.values())]
    rows = tuple((TableCell(model), *(_cell(metrics, name) for name in shown)) for model, metrics in models.items())
    return Table(title, ("Model", *(columns[name] for name in shown)), rows, note)


def _cell(metrics: Metrics, name: str) -> TableCell:
    return metric_cell(metrics[name], signed=name in _SIGNED) if name in metrics else NOTHING
