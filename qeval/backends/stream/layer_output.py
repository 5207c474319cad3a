"""The output of a decoder layer as later ones are given it: a tuple of tensors, states first.

Most layers are given the states of the layer before them alone. Others get more of what earlier ones made: the choice
of a sparse attention's indexer (GLM-DSA) as a second return value, keys and values (Gemma 3n, Gemma 4) in a mapping.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

States = tuple[Tensor, ...]
"""The states [batch, tokens, d_model], with whatever else later layers are given behind them."""


@dataclass(frozen=True)
class OutputForm:
    """The form of a layer's output.

    Attributes:
        length: The items of the tuple that it returns; None where it returns its states alone.
        beside: The places in that tuple of the tensors that the next layer is given.
        shared: The tensors that it and earlier layers left for later ones: the argument of the mapping, the key, and
            the number of tensors there, None for one that is in no tuple.
    """

    length: int | None = None
    beside: tuple[int, ...] = ()
    shared: tuple[tuple[str, Any, int | None], ...] = ()

    def states(self, returned: Any, keywords: Mapping[str, Any]) -> States:
        """Return what a layer hands on that was called with `keywords` and returned `returned`."""
        items = returned if isinstance(returned, tuple | list) else (returned,)
        beside = (items[place] for place in self.beside)
        shared = (part for name, key, _ in self.shared for part in tensors_in(keywords[name][key]))
        return (items[0], *beside, *shared)

    def put_back(self, states: States, keywords: Mapping[str, Any]) -> Any:
        """Leave in the mappings what the layer left there, and return what it returned."""
        rest = iter(states[1:])
        beside = {place: next(rest) for place in self.beside}
        for name, key, count in self.shared:
            keywords[name][key] = next(rest) if count is None else tuple(next(rest) for _ in range(count))
        return self.around(states[0], beside)

    def around(self, hidden: Tensor, beside: Mapping[int, Tensor] | None = None) -> Any:
        """Return states in the form of the layer's return value; what is not `beside` them is None."""
        if self.length is None:
            return hidden
        return (hidden, *((beside or {}).get(place) for place in range(1, self.length)))


class PassRecord:
    """A pass through all decoder layers: the arguments of each, and what it handed on."""

    def __init__(self, ids: Tensor) -> None:
        """Begin with the tokens [batch, tokens] of the pass; no layer has run."""
        self.ids = ids
        self.given: list[States] = []
        """Copies of every tensor among each layer's arguments."""
        self.forms: list[OutputForm] = []
        self.states: list[States] = []
        self.final: Tensor | None = None
        """The model's final states, where its body returned them."""
        self._returned: Any = None
        self._held: dict[tuple[str, Any], Any] = {}
        self._keywords: Mapping[str, Any] = {}

    def enter(self, args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Note what the next layer is given."""
        tensors = list(tensors_in((args, keywords)))
        if self.forms:
            self._close(tensors)
        self.given.append(_copies(tensors))
        self._held = dict(_entries(keywords))

    def leave(self, returned: Any, keywords: Mapping[str, Any]) -> None:
        """Note what the layer that was entered hands on."""
        left = {place: value for place, value in _entries(keywords) if value is not self._held.get(place)}
        before = self.forms[-1].shared if self.forms else ()
        shared = dict.fromkeys(
            [*before, *((*place, count) for place, value in left.items() for count in _count(value))]
        )
        length = len(returned) if isinstance(returned, tuple | list) else None
        self.forms.append(OutputForm(length, (), tuple(shared)))
        self._returned, self._keywords = returned, keywords
        self.states.append(_copies(self.forms[-1].states(returned, keywords)))

    def _close(self, tensors: Sequence[Tensor]) -> None:
        """Find what the layer before returned beside its states among the `tensors` that this one is given."""
        items = self._returned if isinstance(self._returned, tuple | list) else ()
        beside = [
            place
            for place, item in enumerate(items)
            if place and isinstance(item, Tensor) and any(item is tensor for tensor in tensors)
        ]
        self.forms[-1] = replace(self.forms[-1], beside=tuple(beside))
        self.states[-1] = _copies(self.forms[-1].states(self._returned, self._keywords))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def with_states(hidden: Tensor, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Return a layer's arguments with other states in the place of the first tensor, which is theirs."""
    if args:
        return (hidden, *args[1:]), keywords
    name = next(name for name, value in keywords.items() if isinstance(value, Tensor))
    return args, {**keywords, name: hidden}


def _copies(tensors: Sequence[Tensor]) -> States:
    """Return tensors that nothing changes in place any more."""
    return tuple(tensor.clone() for tensor in tensors)


def _entries(keywords: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], Any]]:
    """Yield what lies in the mappings among a layer's arguments, by the argument's name and the key."""
    for name, mapping in keywords.items():
        if isinstance(mapping, MutableMapping):
            yield from (((name, key), value) for key, value in mapping.items())


def _count(value: Any) -> tuple[int | None, ...]:
    """Return the number of tensors of a tuple of them, None for a tensor; nothing for anything else."""
    if isinstance(value, Tensor):
        return (None,)
    if isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
        return (len(value),)
    return ()
