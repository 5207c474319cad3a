"""`qeval explain`: which questions, tokens, subjects and layers make a variant's loss."""

from typing import Annotated

import typer

from qeval.cli import options
from qeval.cli.printing import print_json, stdout

_WIDTH = 180
"""Columns for tables whose cells hold text."""


def explain(
    run: options.RunFolder,
    variant: Annotated[str, typer.Argument(help="The variant's name, as the report spells it.", show_default=False)],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows of each table.")] = 20,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show which rows make a variant's loss, from a finished run's folder alone."""
    del debug  # read by the program's own error handler
    from qeval.report.console import terminal_table  # noqa: PLC0415 - the statistics take a second to import
    from qeval.report.explain import build_explanation as explain_run  # noqa: PLC0415
    from qeval.report.explain import explanation_json  # noqa: PLC0415
    from qeval.report.explain.answers import answers_sentence, answers_table  # noqa: PLC0415
    from qeval.report.explain.tables import explanation_tables, task_sentence, worst_sentence  # noqa: PLC0415

    explanation = explain_run(run, variant)
    if as_json:
        print_json(explanation_json(explanation))
        return
    console = stdout(_WIDTH)
    answers = [
        answers_table(loss.title, [(None, one) for one in loss.changed], limit)
        for loss in explanation.answers
        if loss.changed
    ]
    for table in (*explanation_tables(explanation, limit), *answers):
        console.print(terminal_table(table, table.note))
    sentences = [f"note: {note}" for note in explanation.notes] + [task_sentence(task) for task in explanation.tasks]
    sentences += [answers_sentence(explanation.variant, loss) for loss in explanation.answers]
    if explanation.tokens:
        sentences.append(f"{explanation.variant}: {worst_sentence(explanation.tokens)}.")
    for sentence in sentences:
        console.print(sentence)
