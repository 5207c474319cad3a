"""One decoder layer of a weightless model at a time, through the model's own forward pass.

Masks, positions, rotary embeddings and caches are made by the model's own code, whatever its family: its forward pass
is run once a layer and batch, with every layer but one handing on what it is given.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qeval.errors import UsageError, first_line
from qeval.models.structure.forward import body_of, cache_arguments
from qeval.models.structure.precision import outside_autocast
from qeval.models.structure.trace import text_config

_Forward = Callable[..., Any]
Turn = Callable[[int], None]
_DIMENSIONS = 3
"""Of the states that layers hand on, [batch, tokens, d_model]; several streams of them have more."""


class Relay:
    """Takes the place of each decoder layer's forward; `close` gives the model its own back."""

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        """`model` is a causal language model, `layers` are its decoder layers in order."""
        self._base, self._layers = body_of(model), list(layers)
        self._cache_arguments = cache_arguments(self._base.forward)
        self._forwards: list[_Forward] = [layer.forward for layer in self._layers]
        self._active: int | None = None
        self._hidden: Tensor | None = None
        self._found: Tensor | None = None
        self._beside: tuple[Any, ...] = ()
        self._as_tuple = False
        self._takes_ids = bool(getattr(text_config(model), "hidden_size_per_layer_input", 0))
        self._turn: tuple[Turn, Turn] | None = None
        for index, layer in enumerate(self._layers):
            layer.forward = self._stand_in(index)

    def close(self) -> None:
        """Undo it."""
        for layer in self._layers:
            del layer.forward

    def run(self, index: int, hidden: Tensor | None, cache: Any, ids: Tensor) -> Tensor:
        """Return what layer `index` makes of `given` [batch, tokens, d_model]; None: of the embeddings of `ids`.

        The last layer's is the model's final hidden states, norm included. `cache` is handed to the model.

        Raises:
            UsageError: The model's code wants more of its layers than states.
        """
        try:
            return self._run(index, hidden, cache, ids)
        except (NotImplementedError, ValueError) as error:
            raise UsageError(
                f"{type(self._base).__name__}'s code can't run its layers one at a time ({first_line(error)}); leave "
                "--stream out."
            ) from error

    def _run(self, index: int, hidden: Tensor | None, cache: Any, ids: Tensor) -> Tensor:
        self._active, self._hidden, self._found = index, hidden, None
        # layers with inputs of their own (Gemma 4) get them from the ids
        embeds = None if hidden is None or self._takes_ids else self._embeddings(hidden)
        inputs = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        output = self._base(**inputs, **self._cache_arguments(cache)).last_hidden_state
        found: Tensor | None = output if index == len(self._layers) - 1 else self._found
        assert found is not None
        self._hidden = self._found = None
        return found

    def _embeddings(self, hidden: Tensor) -> Tensor:
        """Return what the model takes for embeddings while a layer is given something else.

        They are of no use but for their shape: where embeddings are narrower than the layers (OPT-350m), the model
        projects them before its first layer.
        """
        width = self._base.get_input_embeddings().embedding_dim
        return hidden if hidden.shape[-1] == width else hidden.new_zeros(*hidden.shape[:-1], width)

    def every_layer(self, before: Turn, after: Turn) -> None:
        """From here on forward passes run all layers, telling of each before and after; `run` ends that."""
        self._active, self._turn = None, (outside_autocast(before), outside_autocast(after))

    def _stand_in(self, index: int) -> _Forward:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._active is None:
                held = _sizes(kwargs)
                output = self._in_turn(index, hidden, args, kwargs)
                if held != _sizes(kwargs):
                    raise UsageError(
                        f"Later decoder layers of {type(self._base).__name__} attend to keys and values of earlier "
                        "ones, so they can't be run one at a time; leave --stream out."
                    )
                return output
            if self._active != index:
                return (hidden,) if self._as_tuple else hidden
            output = self._forwards[index](hidden if self._hidden is None else self._hidden, *args, **kwargs)
            self._found = _first(output)
            return output

        return forward

    def _in_turn(self, index: int, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        """Run all layers, one after the other; each must be given what the one before it gave."""
        assert self._turn is not None
        handed_on = any(each is given for each in self._beside for given in (*args, *kwargs.values()))
        if hidden.dim() != _DIMENSIONS or (index and (hidden is not self._found or handed_on)):
            raise UsageError(
                f"{type(self._base).__name__} computes between its decoder layers, or hands more than states on, so "
                "they can't be run one at a time; leave --stream out."
            )
        if len(hidden) != 1:  # of the few tokens that are tried
            raise UsageError(
                f"{type(self._base).__name__} lays its states as [tokens, batch, width], so its layers can't be run "
                "one at a time; leave --stream out."
            )
        before, after = self._turn
        before(index)
        output = self._forwards[index](hidden, *args, **kwargs)
        after(index)
        self._as_tuple = isinstance(output, tuple)
        self._found = _first(output)
        self._beside = tuple(part for part in output[1:] if isinstance(part, Tensor)) if self._as_tuple else ()
        return output


def _sizes(keywords: dict[str, Any]) -> dict[str, int]:
    """Return how much the mappings among a layer's arguments hold: layers leave there what later ones need."""
    return {name: len(value) for name, value in keywords.items() if isinstance(value, MutableMapping)}


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return token ids [batch, longest], filled up with zeros on the right, where a causal model can't see them."""
    longest = max(len(tokens) for tokens in sequences)
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)
