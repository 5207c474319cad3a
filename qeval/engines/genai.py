"""onnxruntime-genai's Generator on a folder of its model builder's.

A Generator runs a token when it is asked for the logits after it, and picks the next one when it is told to generate.
So a step is: pick (or, where the caller's token is another one, pick from logits that hold nothing else), then ask for
the logits. What that adds to a plain loop of `generate_next_token`, a copy of the logits and an argmax, is under
0.1 ms at 49,152 tokens of vocabulary.

Two ids have a meaning that no benchmark wants: after the end-of-sequence id a sequence gets nothing but padding, and
padding at the end of a prompt is masked, so that a prompt that ends in a pad id, which many models share with
end-of-sequence, is answered wrong (0.18, without a word). Both ids are therefore moved to the vocabulary's last, which
is hardly ever a word; where it is met all the same it is handled, or refused in a sentence.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeval.backends.onnx.decoder import past_inputs
from qeval.backends.onnx.files import GENAI_CONFIG
from qeval.backends.onnx.packages import first_line, import_genai, require_genai, says_no_memory
from qeval.backends.onnx.providers import choose
from qeval.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.engines.onnxruntime import DTYPES, device_id_of, disk_bytes, facts_of, weights_told
from qeval.engines.opening import Opening
from qeval.errors import QevalError, UsageError

NAME = "onnxruntime-genai"
_PROVIDERS = {
    "cpu": "cpu", "cuda": "cuda", "dml": "dml", "openvino": "OpenVINO", "qnn": "QNN", "trt-rtx": "NvTensorRtRtx",
    "webgpu": "WebGPU",
}  # fmt: skip
"""Its names of our providers, which are its names of devices too."""
_NOTHING_ELSE = np.float32(-1e30)


class GenaiEngine:
    """A folder, open in onnxruntime-genai on one provider."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 1, device_id: int = 0) -> None:
        """`provider` goes by our name; `threads` are the CPU's.

        Raises:
            UsageError: the folder can't be used, or onnxruntime-genai has no such provider.
            QevalError: it refuses the model, or runs it elsewhere.
            MemoryError: there is no room for the weights.
        """
        chosen = choose(provider)
        if provider not in _PROVIDERS:
            raise UsageError(f"onnxruntime-genai has no provider {provider}; it has {', '.join(_PROVIDERS)}.")
        if not (folder / GENAI_CONFIG).is_file():
            raise UsageError(f"'{folder}' has no {GENAI_CONFIG}, without which onnxruntime-genai opens nothing.")
        facts = facts_of(folder)
        if facts.vocab_size is None:
            raise UsageError(f"{facts.files.config} names no vocab_size, which onnxruntime-genai needs.")
        self._runtime, self._vocab_size = import_genai(), facts.vocab_size
        self._model = self._opened(folder, provider, threads, device_id)
        self._pasts, self._max_length = past_inputs(facts), int(facts.context_length or 0)
        versions = require_genai()
        self._identity = Identity(
            engine=NAME,
            provider=chosen.onnx_name,
            dtype=DTYPES[self._pasts[0].dtype],
            weights=weights_told(facts),
            threads=threads,
            version=f"{versions.genai_distribution} {versions.genai_version}, "
            f"{versions.distribution} {versions.version}",
        )
        self._disk_bytes, self._weights_bytes = disk_bytes(facts), facts.size_bytes
        self._generator: Any = None
        self._room, self._length = (0, 0), 0
        self._logits: NDArray[np.float32] = np.empty((0, 0), np.float32)

    @property
    def identity(self) -> Identity:
        """What ran."""
        return self._identity

    @property
    def max_length(self) -> int:
        """The context length that the folder's configuration states."""
        return self._max_length

    @property
    def compile_seconds(self) -> float:
        """Graph optimizations belong to opening."""
        return 0.0

    def reset(self, batch: int, capacity: int) -> None:
        """A new Generator, whose keys and values take `capacity` tokens from the start.

        Raises:
            UsageError: the sequence is longer than the context.
            MemoryError: there is no room for the keys and values.
        """
        check_room(NAME, batch, capacity, max_length=self._max_length)
        self._generator = None  # the old one goes first: two caches may not fit
        parameters = self._runtime.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, max_length=capacity, do_sample=False)
        self._generator = self._tried(lambda: self._runtime.Generator(self._model, parameters))
        self._room, self._length = (batch, capacity), 0

    def prefill(self, prompts: Tokens) -> Tokens:
        """Run the prompts [batch, prompt].

        Raises:
            UsageError: one ends in the id that stands for padding.
        """
        self._check(prompts)
        if (prompts[:, -1] == self._last_id).any():
            raise UsageError(
                f"A prompt ends in token {self._last_id}, the vocabulary's last, which onnxruntime-genai is told to "
                "take for padding here; give another prompt."
            )
        self._tried(lambda: self._generator.append_tokens(prompts.astype(np.int32)))
        return self._choice(prompts.shape[1])

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch].

        Raises:
            QevalError: there is no room for it, the forward failed, or a batch of sequences would have to go on
                after the end-of-sequence id.
        """
        self._check(tokens[:, None])
        if (tokens == self._last_id).any():
            self._append_last_id(tokens)
        else:
            if (tokens != self._logits.argmax(axis=1)).any():
                self._tried(lambda: self._generator.set_logits(self._nothing_but(tokens)))
            self._tried(self._generator.generate_next_token)
        return self._choice(1)

    def logits(self) -> NDArray[np.float32]:
        """The logits [batch, vocab] of the last token."""
        return self._logits.copy()

    def memory(self) -> Memory:
        """The initializers as stored, and keys and values for the whole capacity, which is how they are held."""
        batch, capacity = self._room if self._generator is not None else (0, 0)
        per_token = sum(past.heads * past.head_size * np.dtype(past.dtype).itemsize for past in self._pasts)
        return Memory(self._disk_bytes, self._weights_bytes, batch * capacity * per_token, None)

    def close(self) -> None:
        """Let the generator go, then the model."""
        self._generator = None
        self._model = None

    @property
    def _last_id(self) -> int:
        """What stands for end-of-sequence and for padding."""
        return self._vocab_size - 1

    def _opened(self, folder: Path, provider: str, threads: int, device_id: int) -> Any:
        config = self._runtime.Config(str(folder))
        config.clear_providers()
        name = _PROVIDERS[provider]
        if provider != "cpu":
            config.append_provider(name)
        if device_id:
            config.set_provider_option(name, "device_id", str(device_id))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        ids = {"eos_token_id": [self._last_id], "pad_token_id": self._last_id}
        config.overlay(json.dumps({"model": {**ids, "decoder": {"session_options": options}}}))
        model = self._tried(lambda: self._runtime.Model(config))
        if str(model.device_type).lower() != name.lower():
            raise QevalError(
                f"onnxruntime-genai runs the model on {model.device_type}, where {provider} was asked for."
            )
        return model

    def _check(self, ids: Tokens) -> None:
        assert self._generator is not None, "reset comes first"
        check_tokens(NAME, ids, self._length + ids.shape[1], self._room[1], self._vocab_size)

    def _choice(self, added: int) -> Tokens:
        """Run what was appended; the most likely next token of each sequence."""
        found = self._tried(self._generator.get_logits)
        self._logits = found.reshape(self._room[0], -1)
        self._length += added
        chosen: Tokens = self._logits.argmax(axis=1)
        return chosen

    def _nothing_but(self, tokens: Tokens) -> NDArray[np.float32]:
        """Logits [batch, 1, vocab] from which only these tokens can be picked."""
        logits = np.full((len(tokens), 1, self._vocab_size), _NOTHING_ELSE)
        logits[np.arange(len(tokens)), 0, tokens] = 0.0
        return logits

    def _append_last_id(self, tokens: Tokens) -> None:
        if len(tokens) > 1:
            raise QevalError(
                f"{NAME} can't go on after token {self._last_id}, the vocabulary's last, in a batch: it stands for "
                "end-of-sequence there; give other prompts, or a batch of 1."
            )
        self._tried(lambda: self._generator.append_tokens(tokens[:, None].astype(np.int32)))

    @staticmethod
    def _tried(call: Any) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            if says_no_memory(error):
                raise MemoryError(f"onnxruntime-genai: {first_line(error)}.") from error
            raise QevalError(f"onnxruntime-genai failed: {first_line(error)}.") from error


def open_engine(opening: Opening, place: Path) -> GenaiEngine:
    """The engine on the folder that `onnx_folder.prepare_genai` found or made.

    Raises:
        UsageError, QevalError, MemoryError: as `GenaiEngine`.
    """
    return GenaiEngine(place, opening.provider, opening.threads, device_id_of(opening.device))
