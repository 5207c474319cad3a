"""One decoder layer of a weightless model at a time, through the model's own forward pass.

Masks, positions, rotary embeddings and caches are made by the model's own code, whatever its family: its forward pass
is run once a layer and batch. The layer before the one that runs hands on what it gave when it ran itself, those before
that one hand on what they are given, and nothing behind the one that runs is reached. `check_alone` shows that each
layer is so given what it is given in a whole pass.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qeval.backends.stream.layer_output import OutputForm, PassRecord, States, tensors_in, with_states
from qeval.errors import UsageError
from qeval.models.structure.forward import FinalStates, body_of
from qeval.models.structure.precision import outside_autocast
from qeval.models.structure.trace import text_config

_Forward = Callable[..., Any]
Turn = Callable[[int], None]
_DIMENSIONS = 3
"""Of one stream of states, [batch, tokens, width]; some models have several (DeepSeek-V4, Gemma 3n)."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class _LayerReached(Exception):  # noqa: N818 - it ends a pass, and is no error
    """The layer that was to run did: nothing behind it is wanted."""


class Relay:
    """Takes the place of each decoder layer's forward; `close` gives the model its own back."""

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        """`model` is a causal language model, `layers` are its decoder layers in order."""
        self._model, self._layers = model, list(layers)
        self._embedding, self._config = model.get_input_embeddings(), text_config(model)
        self._final_states: FinalStates | None = None
        self._forwards: list[_Forward] = [layer.forward for layer in self._layers]
        self._forms: Sequence[OutputForm] = [OutputForm()] * len(self._layers)
        self._takes_ids = False
        self.state_bytes = 0
        """The most bytes a token that a layer hands on; known after `check_alone`."""
        self.hands_on_plain_states = True
        """True if they hand on [batch, tokens, d_model] and no more: no parallel streams (DeepSeek-V4)."""

        # of a pass through one layer
        self._active, self._forward = 0, self._forwards[0]
        self._states: States | None = None
        self._ends = True

        # of a pass through all layers
        self._turn: tuple[Turn, Turn] | None = None
        self._record: PassRecord | None = None
        self._hooks = ExitStack()

        for index, layer in enumerate(self._layers):
            layer.forward = self._stand_in(index)

    def close(self) -> None:
        """Undo it."""
        self._hooks.close()
        for layer in self._layers:
            del layer.forward

    def run(self, index: int, given: States | None, cache: Any, ids: Tensor, *, final: bool = True) -> States:
        """Return what layer `index` hands on; of the last one, the model's final states alone, norm included.

        Args:
            index: The layer.
            given: What the layer before it handed on; None for the first to start from the embeddings of `ids`.
            cache: Handed to the model.
            ids: The tokens [batch, tokens].
            final: Whether the last layer's states go through what is behind it.
        """
        self._states, self._ends = given, final
        ended = self._pass(index, self._forwards[index], cache, ids)
        found, self._states = self._states, None
        if ended is not None:
            return (ended,)
        assert found is not None
        return found

    def _pass(self, active: int, forward: _Forward, cache: Any, ids: Tensor) -> Tensor | None:
        """Run the model up to the layer `active`, which is run by `forward`; return final states if it ends behind."""
        self._hooks.close()
        self._turn, self._active, self._forward = None, active, forward
        self._final_states = self._final_states or FinalStates(self._model)
        try:
            if self._states is None or self._takes_ids:
                return self._final_states(ids, cache)
            # of no use but for their shape and type; the model may change them in place
            embeddings = self._states[0].new_zeros(*ids.shape, self._embedding.embedding_dim)
            return self._final_states(None, cache, inputs_embeds=embeddings)
        except _LayerReached:
            return None

    def every_layer(self, before: Turn, after: Turn) -> None:
        """From here on forward passes run all layers, telling of each before and after; `run` ends that."""
        self._turn = (outside_autocast(before), outside_autocast(after))
        self._hooks.close()
        self._hooks.callback(self._embedding.register_forward_pre_hook(self._begin).remove)
        self._hooks.callback(body_of(self._model).register_forward_hook(self._leave_body).remove)
        self._hooks.callback(self._model.get_output_embeddings().register_forward_pre_hook(self._reach_head).remove)

    def _begin(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._record = PassRecord(args[0])

    def _leave_body(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._record is not None:
            self._record.final = getattr(output, "last_hidden_state", None)

    def _reach_head(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._record is not None:
            self._record.final = args[0]  # what a transform before the head made of the body's (BERT)

    def _stand_in(self, index: int) -> _Forward:
        def forward(*args: Any, **keywords: Any) -> Any:
            if self._turn is not None:
                return self._in_turn(index, args, keywords)
            if index == self._active:
                return self._reached(index, args, keywords)
            if index + 1 == self._active and self._states is not None:
                return self._forms[index].put_back(self._states, keywords)
            return self._forms[index].around(next(tensors_in((args, keywords))))

        return forward

    def _reached(self, index: int, args: Any, keywords: Any) -> Any:
        """Run the active layer; what is behind the last one is the model's own."""
        if index == 0 and self._states is not None:
            args, keywords = with_states(self._states[0], args, keywords)
        returned = self._forward(*args, **keywords)
        if self._ends and index + 1 == len(self._layers):
            return returned
        self._states = self._forms[index].states(returned, keywords)
        raise _LayerReached

    def _in_turn(self, index: int, args: Any, keywords: Any) -> Any:
        """Run a layer of a pass through all of them."""
        assert self._turn is not None
        if self._record is None or index != len(self._record.given):
            raise UsageError(
                f"{type(self._model).__name__} runs its decoder layers in an order of its own, or some more than once, "
                "so they can't be run one at a time; leave --stream out."
            )
        hidden = next(tensors_in((args, keywords)))
        if hidden.dim() == _DIMENSIONS and len(hidden) != 1:  # of the one text that is tried
            raise UsageError(
                f"{type(self._model).__name__} lays its states as [tokens, batch, width], so its layers can't be run "
                "one at a time; leave --stream out."
            )
        before, after = self._turn
        self._record.enter(args, keywords)
        before(index)
        returned = self._forwards[index](*args, **keywords)
        after(index)
        self._record.leave(returned, keywords)
        return returned

    def check_alone(self) -> None:
        """Try whether each layer run alone is given what the last pass through all layers gave it, bit for bit.

        No weight of a layer is needed for that. The first layers are also tried with the tokens themselves in place of
        embeddings, where layers have inputs of their own (Gemma 4) or choose experts by token (DeepSeek-V4).

        Raises:
            UsageError: It is given something else.
        """
        record = self._record
        if record is None or len(record.forms) != len(self._layers):
            raise UsageError(
                f"{type(self._model).__name__} does not run all of its decoder layers; leave --stream out."
            )
        self._forms = record.forms
        for self._takes_ids in (False, True):
            if all(self._is_given_the_same(index, record) for index in range(len(self._layers) + 1)):
                self.state_bytes = max(self._bytes(states, record.ids.numel()) for states in record.states)
                shape = (*record.ids.shape, self._config.hidden_size)
                self.hands_on_plain_states = all([each.shape for each in states] == [shape] for states in record.states)
                self._record = None
                return
        raise UsageError(
            f"{type(self._model).__name__} computes between its decoder layers, from more than what the last of them "
            "handed on, so they can't be run one at a time; leave --stream out."
        )

    def _is_given_the_same(self, index: int, record: PassRecord) -> bool:
        """Try a layer; behind the last one, whether the model ends in the same states."""
        same: list[bool] = []

        def compare(*args: Any, **keywords: Any) -> Any:
            same.append(_equal([*tensors_in((args, keywords))], record.given[index]))
            raise _LayerReached

        self._states = record.states[index - 1] if index else None
        try:
            ended = self._pass(index, compare, None, record.ids)
        except _FAILURES:
            return False
        finally:
            self._states = None
        if ended is not None and record.final is not None:
            same.append(_equal([ended], [record.final]))
        return all(same)

    def _bytes(self, states: States, tokens: int) -> int:
        """Return the bytes a token of what a layer hands on; an indexer's choice is as long as it gets."""
        most = getattr(self._config, "index_topk", None) or 1
        chosen = [tensor for tensor in states if not tensor.is_floating_point()]
        others = sum(tensor.nbytes for tensor in states if tensor.is_floating_point()) // tokens
        return others + sum(tensor.element_size() * most for tensor in chosen)


def _equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether tensors are the same, bit for bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return token ids [batch, longest], filled up with zeros on the right, where a causal model can't see them."""
    longest = max(len(tokens) for tokens in sequences)
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)
