"""The columns of stored rows. Nothing is averaged before it is stored; reports are made from rows alone.

Token rows: one a scored position of a window. `position` is the token's index in its window, `token` its id.
`nll` is -log p(token | tokens before it in the window), null where it is not scored (the first token of
a window has no context). The other columns compare the distribution *after* the position (the prediction of the
next token) with the baseline's, and are null in the baseline's own rows and where it is not scored.

Token rows of a model behind an endpoint have two columns more, `kl_lower_bound_nats` (of KL(baseline || variant), from
the tokens that the endpoint reports) and `mass_outside` (the baseline's probability of all others); their `kl_nats` is
null, since no bound stands in the place of a KL.

Item rows: one a question. `item` is the question's index in its file.

Score rows: one an item's score by one metric under one filter, of a task without choices or of another program
(`qeval import`), several where it was asked again. `response` and `answer` are texts of tasks that generate; they and
what follows are null where nothing was generated or it isn't known.

Needle rows: one a needle of a haystack, whose answer was forced after the question.

Drift rows: one a token of the baseline's greedy continuation of a prompt. `position` counts generated tokens, `token`
is what the baseline said there, `pred` what this variant says after the baseline's own tokens (the baseline too:
rounding may tell two equally likely tokens apart otherwise when all positions are run at once). The rest compares the
variant's distribution with the baseline's there, and is null in the baseline's own rows.

Trace rows: one a token that is forced on every model, a chain of thought, an answer or a call of a function, and one
more behind an answer, which forces none (`token` -1). `position` counts in its piece. Probabilities are of the next
token before `token`.
"""

import numpy as np
import pyarrow as pa

ROWS_VERSION = 2

READ_ERRORS = (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError)
"""What pyarrow raises over a file that is missing, torn or no Parquet."""

_name = pa.dictionary(pa.int16(), pa.string())

TOKENS_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("corpus", _name, nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("nll", pa.float64()),  # nats
        pa.field("kl_nats", pa.float64()),  # KL(baseline || variant)
        pa.field("reverse_kl_nats", pa.float64()),  # KL(variant || baseline)
        pa.field("kl_abs_modelopt", pa.float64()),  # sum of p_base * |log p_base - log p_variant|
        pa.field("top1_agreement", pa.bool_()),  # the same most likely next token
        pa.field("overlap", pa.float64()),  # sum of min(p_base, p_variant): 1 - total variation distance
        pa.field("top5_agreement", pa.float64()),  # share of the baseline's 5 likeliest tokens among the variant's 5
        pa.field("top10_agreement", pa.float64()),  # the same of 10
        pa.field("sampling_kl_nats", pa.float64()),  # with --sampling: KL on the baseline's nucleus, both cut to it
        pa.field("outside_nucleus", pa.float64()),  # with --sampling: what the variant would draw from outside of it
        pa.field("delta_p", pa.float64()),  # p_variant - p_base of the true token at `position` (as nll)
        pa.field("entropy_nats", pa.float64()),  # of this variant's own distribution after the position
        pa.field("kernel_kl_nats", pa.float64()),  # KL(the same weights in torch || this), where both were run
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

NEWER_COLUMNS = (("overlap",), ("top5_agreement", "top10_agreement", "sampling_kl_nats", "outside_nucleus"))
"""The columns that token rows got after their first version, those of one change together."""


def older_tokens_schema(changes: int) -> pa.Schema:
    """Return the columns of token rows after so many changes; such rows are read, and the others are null."""
    missing = {name for names in NEWER_COLUMNS[changes:] for name in names}
    return pa.schema([field for field in TOKENS_SCHEMA if field.name not in missing], metadata=TOKENS_SCHEMA.metadata)


TOKENS_SCHEMAS = (TOKENS_SCHEMA, *(older_tokens_schema(changes) for changes in range(len(NEWER_COLUMNS))))
"""All that are read, this version's first."""

LOWER_BOUND_COLUMNS = ("kl_lower_bound_nats", "mass_outside")
"""Columns of a model behind an endpoint, which reports the log-probabilities of a few tokens: what its KL is at least,
and the baseline's probability of all other tokens. Its `kl_nats` is null: no bound stands in the place of a KL."""

ENDPOINT_TOKENS_SCHEMA = pa.schema(
    [*TOKENS_SCHEMA, *(pa.field(name, pa.float64()) for name in LOWER_BOUND_COLUMNS)], metadata=TOKENS_SCHEMA.metadata
)
"""The columns of such a model's token rows; no other rows have the last ones, which read as null there."""

ITEMS_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("task", pa.string(), nullable=False),  # "mmlu", "hellaswag": what the user asked for
        pa.field("subject", pa.string(), nullable=False),  # the leaf: "astronomy"; the task itself without subjects
        pa.field("item", pa.int32(), nullable=False),
        pa.field("gold", pa.int32(), nullable=False),
        pa.field("pred", pa.int32(), nullable=False),  # argmax of the summed log-likelihoods, first of equals
        pa.field("choice_loglikelihoods", pa.list_(pa.float64()), nullable=False),  # nats, one a choice
        pa.field("acc", pa.float64()),  # the harness's own metric for the item, 0 or 1
        pa.field("acc_norm", pa.float64()),  # likewise, length-normalized, where the task has it
        pa.field(
            "shots", pa.int32(), nullable=False
        ),  # examples in the prompt after any were dropped; -1: not known (imported)
        pa.field("prompt_tokens", pa.int32(), nullable=False),  # -1: not known (imported)
        pa.field("prompt_sha256", pa.string(), nullable=False),  # of the token ids: equal on both sides of a pair
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

DRIFT_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("corpus", _name, nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("pred", pa.int32(), nullable=False),
        pa.field("kl_nats", pa.float64()),  # KL(baseline || variant)
        pa.field("margin_nats", pa.float64()),  # baseline's log p(token) - log p(pred): 0 where they are the same
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

NEEDLE_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("length", pa.int32(), nullable=False),  # the tokens that were asked for
        pa.field("haystack", pa.int32(), nullable=False),  # its number among those of the length
        pa.field("depth", pa.float64(), nullable=False),  # of the needle: 0 at the start, 1 at the end
        pa.field("log_p", pa.float64()),  # nats, of the whole answer
        pa.field("rank", pa.int32(), nullable=False),  # the largest of the answer's tokens; 1: said greedily
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("prompt_sha256", pa.string(), nullable=False),  # of prompt and answer: equal on both sides of a pair
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

TRACES_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("task", _name, nullable=False),  # "reasoning", "grammar"
        pa.field("item", pa.int32(), nullable=False),  # the question or prompt, from 0
        pa.field("draw", pa.int32(), nullable=False),  # which of an item's traces
        pa.field("part", _name, nullable=False),  # "chain", "answer", "after", "call"
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("pred", pa.int32(), nullable=False),  # the most likely token
        pa.field("matches", pa.bool_(), nullable=False),  # pred is token; behind an answer: pred begins another word
        pa.field("log_p", pa.float64()),  # nats, of token
        pa.field("kl_nats", pa.float64()),  # KL(baseline || variant), null in the baseline's own rows
        pa.field("stop_p", pa.float64()),  # of all tokens that end thinking or the turn; null in calls
        pa.field("doubt_p", pa.float64()),  # of all markers of doubt; null in calls, or where the tokenizer has none
        pa.field("leak_p", pa.float64()),  # of all tokens that the call's grammar forbids; null but in calls
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

SCORES_SCHEMA = pa.schema(
    [
        pa.field("variant", _name, nullable=False),
        pa.field("backend", _name, nullable=False),
        pa.field("task", pa.string(), nullable=False),  # "gsm8k_exact_match": a task's metric, as the record lists it
        pa.field("subject", pa.string(), nullable=False),  # what an item is clustered by; the task itself without any
        pa.field("item", pa.string(), nullable=False),
        pa.field("repeat", pa.string(), nullable=False),  # the seed, epoch or run of several scores of an item
        pa.field("score", pa.float64()),  # null where the item was not scored
        pa.field("prompt_sha256", pa.string(), nullable=False),  # of what was asked: equal on both sides of a pair
        pa.field("answer", pa.string()),  # what the filter left of the response
        pa.field("response", pa.string()),  # all that the model said, up to what ended it
        pa.field("response_tokens", pa.int32()),  # generated tokens, the one that ended it included
        pa.field("is_cut", pa.bool_()),  # whether nothing ended the response before its most tokens
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

SCORE_TEXTS = ("answer", "response", "response_tokens", "is_cut")
"""The columns of score rows that only generated answers fill."""

OLDER_SCORES_SCHEMA = pa.schema(
    [field for field in SCORES_SCHEMA if field.name not in SCORE_TEXTS], metadata=SCORES_SCHEMA.metadata
)
"""The columns of runs from before answers were generated: they are read, and those columns are null."""


def constant_column(value: str, rows: int) -> pa.Array:
    """Return a column that says `value` in every row, in the type of the schemas' names."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype=np.int16)), pa.array([value]))
