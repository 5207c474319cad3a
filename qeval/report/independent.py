"""Find the rows that are independent observations: what is repeated, or overlaps, is one, however often it stands.

Questions with equal token ids are one. Windows that overlap are taken together until each cluster holds a window's
length of new text, and a stretch of text that stands elsewhere in the run already belongs to the cluster where it
stands first. A report averages over all rows, as other tools do, and its intervals and tests rest on clusters; a gate
counts distinct rows alone.
"""

import numpy as np
from numpy.typing import NDArray

from qeval.stats.bootstrap import Clusters, Ints
from qeval.store.run import ChatRecord, ProtocolRecord

GRAM = 32
"""Tokens in a row that stand for a stretch of text."""
_REPEATED_SHARE = 0.5
"""A stretch of which at least this much stands in another one is the same observation."""
_BASE = np.uint64(0x9E3779B97F4A7C15)

BoolArray = NDArray[np.bool_]


def window_clusters(windows: Ints, tokens: Ints, protocol: ProtocolRecord | None) -> Ints:
    """Return the cluster of each token row, by the number of the first window in it.

    Args:
        windows: The window of each row, in ascending order, [rows].
        tokens: The token id of each row, in the order of (window, position), [rows].
        protocol: How the windows were cut; None where the run does not say.
    """
    if not len(windows):
        return windows
    labels = overlap_clusters(windows, protocol)
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    return labels[first][_join_repeats(tokens, place.ravel().astype(np.int64), len(first))][place.ravel()]


def is_first_text(windows: Ints, clusters: Ints, protocol: ProtocolRecord | None) -> BoolArray:
    """Return which token rows hold text that stands in no earlier cluster, [rows]; arguments as `window_clusters`."""
    return np.asarray(overlap_clusters(windows, protocol) == clusters, np.bool_)


def overlap_clusters(windows: Ints, protocol: ProtocolRecord | None) -> Ints:
    """Return each row's cluster where windows that overlap are taken together: a window's length of new text in each.

    The first window of a text is all new; of each later one the last `stride` tokens are. The answers of one
    conversation are one cluster.
    """
    if protocol is None:
        return windows
    if protocol.chat is not None:
        return _join_conversations(windows, _overlapping(windows, protocol), protocol.chat)
    return _overlapping(windows, protocol)


def _join_conversations(windows: Ints, clusters: Ints, chat: ChatRecord) -> Ints:
    """Return the clusters where every window of a conversation is of the cluster of its first."""
    firsts: dict[int, int] = {}
    first_window = {answer.window: firsts.setdefault(answer.prompt, answer.window) for answer in chat.answers}
    distinct, place = np.unique(windows, return_inverse=True)
    joined = np.asarray([first_window.get(int(window), -1) for window in distinct], np.int64)[place.ravel()]
    return np.where(joined < 0, clusters, joined)


def _overlapping(windows: Ints, protocol: ProtocolRecord) -> Ints:
    """Return the clusters of windows that overlap by the protocol's stride."""
    if protocol.stride >= protocol.window:
        return windows
    starts = np.array([part.first for part in protocol.parts] or [0], np.int64)
    start = starts[np.searchsorted(starts, windows, side="right") - 1]
    place = windows - start
    per_cluster = max(protocol.window // protocol.stride, 1)
    return np.where(place == 0, windows, start + 1 + (place - 1) // per_cluster * per_cluster)


def question_clusters(subjects: NDArray[np.object_], prompts: NDArray[np.object_]) -> Clusters:
    """Return the subjects as clusters, those that share a question together; of one subject, its distinct questions.

    Args:
        subjects: The subject of each question, [questions].
        prompts: What names each question's token ids, [questions].
    """
    question = Clusters.of(prompts.astype(str))
    subject = Clusters.of(subjects.astype(str))
    if question.count < len(prompts) and subject.count > 1:
        subject = _join_groups(subject, question)
    return subject if subject.count > 1 else question


def is_first_question(prompts: NDArray[np.object_]) -> BoolArray:
    """Return which questions are the first of their token ids, [questions]: a test counts no other."""
    _, first = np.unique(prompts.astype(str), return_index=True)
    mask = np.zeros(len(prompts), np.bool_)
    mask[first] = True
    return mask


def question_notes(title: str, prompts: NDArray[np.object_]) -> list[str]:
    """Return a sentence where questions of a task have equal token ids."""
    distinct = int(is_first_question(prompts).sum())
    if distinct == len(prompts):
        return []
    return [
        f"{title}: {len(prompts) - distinct:,} of {len(prompts):,} questions have the same token ids as another, so "
        f"intervals and tests count {_count(distinct, 'distinct question')}."
    ]


def window_notes(windows: Ints, clusters: Ints, protocol: ProtocolRecord | None) -> list[str]:
    """Return sentences on windows that overlap and on those that hold the text of others."""
    labels = (windows, overlap_clusters(windows, protocol), clusters)
    total, stretches, distinct = (len(np.unique(label)) for label in labels)
    notes = []
    if protocol and protocol.stride < protocol.window and stretches < total:
        notes.append(
            f"The {total:,} windows overlap ({protocol.window} tokens, stride {protocol.stride}), so intervals count "
            f"{_count(stretches, 'stretch', 'stretches')} of text, each of about a window's length."
        )
    elif protocol and protocol.chat and stretches < total:
        notes.append(
            f"The {len(protocol.chat.answers):,} answers are of {protocol.chat.prompts:,} conversations, so intervals "
            "count conversations."
        )
    if distinct < stretches:
        notes.append(
            f"{stretches - distinct:,} of {stretches:,} windows or stretches of text hold tokens that stand in another "
            f"one already, so intervals count {_count(distinct, 'distinct one')}."
        )
    return notes


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _join_groups(groups: Clusters, shared: Clusters) -> Clusters:
    """Join the groups that have a member of `shared` in common."""
    parent = list(range(groups.count))

    def root(group: int) -> int:
        while parent[group] != group:
            group = parent[group]
        return group

    first: dict[int, int] = {}
    for group, member in zip(groups.ids.tolist(), shared.ids.tolist(), strict=True):
        left, right = root(first.setdefault(member, group)), root(group)
        parent[max(left, right)] = min(left, right)
    return Clusters.of(np.array([root(group) for group in range(groups.count)])[groups.ids])


def _join_repeats(tokens: Ints, stretch: Ints, count: int) -> Ints:
    """Return for each stretch the one that it belongs to: an earlier one that holds half of its text, else itself."""
    grams, of = _grams(tokens, stretch)
    order = np.lexsort((of, grams))
    grams, of = grams[order], of[order]
    is_first = np.concatenate([[True], grams[1:] != grams[:-1]])
    earliest = of[is_first][np.cumsum(is_first) - 1]

    # how many runs of a stretch stand in each earlier one, the largest number last
    repeated = earliest < of
    pairs, times = np.unique(of[repeated] * count + earliest[repeated], return_counts=True)
    by_times = np.argsort(times, kind="stable")
    best = dict(zip((pairs // count)[by_times].tolist(), (pairs % count)[by_times].tolist(), strict=True))

    total, again = np.bincount(of, minlength=count), np.bincount(of[repeated], minlength=count)
    label = np.arange(count, dtype=np.int64)
    for number in np.flatnonzero((again >= _REPEATED_SHARE * total) & (again > 0)).tolist():
        label[number] = label[best[number]]
    return label


def _grams(tokens: Ints, stretch: Ints) -> tuple[NDArray[np.uint64], Ints]:
    """Return a hash of every run of tokens within a stretch, and the stretch of each; of short ones the whole."""
    lengths = np.minimum(np.bincount(stretch), GRAM)[stretch]
    parts = [_runs(tokens[lengths == size], stretch[lengths == size], int(size)) for size in np.unique(lengths)]
    return np.concatenate([hashes for hashes, _ in parts]), np.concatenate([of for _, of in parts])


def _runs(tokens: Ints, stretch: Ints, size: int) -> tuple[NDArray[np.uint64], Ints]:
    """Return a hash of every `size` tokens in a row that lie in one stretch, and the stretch of each."""
    length = len(tokens) - size + 1
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.full(length, size, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(size):
            hashes = hashes * _BASE + values[place : place + length]
    inside = stretch[:length] == stretch[size - 1 :]
    return hashes[inside], stretch[:length][inside]
