"""The columns of stored rows. Nothing is averaged before it is stored; reports are made from rows alone.

Token rows: one a scored position of a window. `position` is the token's index in its window, `token` its id.
`nll` is -log p(token | tokens before it in the window), null where it is not scored (the first token of
a window has no context). The other columns compare the distribution *after* the position (the prediction of the
next token) with the baseline's, and are null in the baseline's own rows and where it is not scored.

Token rows of a model behind an endpoint have two columns more, `kl_lower_bound_nats` (of KL(baseline || variant), from
the tokens that the endpoint reports) and `mass_outside` (the baseline's probability of all others); their `kl_nats` is
null, since no bound stands in the place of a KL.

Item rows: one a question. `item` is the question's index in its file.

Score rows: one a score that another program gave an item (`qeval import`), several where it was asked again.

Drift rows: one a token of the baseline's greedy continuation of a prompt. `position` counts generated tokens, `token`
is what the baseline said there, `pred` what this variant says after the baseline's own tokens (the baseline too:
rounding may tell two equally likely tokens apart otherwise when all positions are run at once). The rest compares the
variant's distribution with the baseline's there, and is null in the baseline's own rows.
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
        pa.field("delta_p", pa.float64()),  # p_variant - p_base of the true token at `position` (as nll)
        pa.field("entropy_nats", pa.float64()),  # of this variant's own distribution after the position
        pa.field("kernel_kl_nats", pa.float64()),  # KL(the same weights in torch || this), where both were run
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)

OLDER_TOKENS_SCHEMA = TOKENS_SCHEMA.remove(TOKENS_SCHEMA.get_field_index("overlap"))
"""The columns of runs from before `overlap`: they are read, and that column is null."""

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
    ],
    metadata={b"rows_version": str(ROWS_VERSION).encode()},
)


def constant_column(value: str, rows: int) -> pa.Array:
    """Return a column that says `value` in every row, in the type of the schemas' names."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype=np.int16)), pa.array([value]))
