"""onnxruntime-genai's Generator on a folder of its model builder's.

A Generator that is told to generate runs the token that it holds back, picks the next one and holds that back in turn.
So a step with the token that the engine proposed is one `generate_next_token`, as in any loop of a user's. Where the
caller's token is another, the proposed one is taken back, which the Generator does for one sequence and not for
several: a batch is run again from its start.

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
from qeval.backends.onnx.packages import first_line_of, import_genai, require_genai
from qeval.backends.onnx.providers import choose_provider
from qeval.bench.engines.base import Identity, Memory, Tokens, check_room, check_tokens
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.gpu import bytes_in_use
from qeval.bench.engines.onnxruntime import DTYPES, device_id_of, disk_bytes, facts_of, gpu_of, weights_told
from qeval.errors import QevalError, UsageError, is_out_of_memory

GENAI_ENGINE = "onnxruntime-genai"
_PROVIDERS = {
    "cpu": "cpu", "cuda": "cuda", "dml": "dml", "openvino": "OpenVINO", "qnn": "QNN", "trt-rtx": "NvTensorRtRtx",
    "webgpu": "WebGPU",
}  # fmt: skip
"""Its names of our providers, which are its names of devices too."""


class GenaiEngine:
    """A folder, open in onnxruntime-genai on one provider."""

    compile_seconds = 0.0
    """Graph optimizations belong to opening."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 1, device_id: int = 0) -> None:
        """Open a folder; `provider` goes by our name, `threads` are the CPU's.

        Raises:
            UsageError: the folder can't be used, or onnxruntime-genai has no such provider.
            QevalError: it refuses the model, or runs it elsewhere.
            MemoryError: there is no room for the weights.
        """
        chosen = choose_provider(provider)
        if provider not in _PROVIDERS:
            raise UsageError(f"onnxruntime-genai has no provider {provider}; it has {', '.join(_PROVIDERS)}.")
        if not (folder / GENAI_CONFIG).is_file():
            raise UsageError(f"'{folder}' has no {GENAI_CONFIG}, without which onnxruntime-genai opens nothing.")
        facts = facts_of(folder)
        if facts.vocab_size is None:
            raise UsageError(f"{facts.files.config} names no vocab_size, which onnxruntime-genai needs.")
        self._runtime, self._vocab_size = import_genai(), facts.vocab_size
        self._model = self._opened(folder, provider, threads, device_id)
        self._pasts, self.max_length = past_inputs(facts), int(facts.context_length or 0)
        versions = require_genai()
        self.identity = Identity(
            engine=GENAI_ENGINE,
            provider=chosen.onnx_name,
            dtype=DTYPES[self._pasts[0].dtype],
            weights=weights_told(facts),
            threads=threads,
            version=f"{versions.genai_distribution} {versions.genai_version}, "
            f"{versions.distribution} {versions.version}",
        )
        self._disk_bytes, self._weights_bytes = disk_bytes(facts), facts.size_bytes
        self._gpu = gpu_of(provider, device_id)
        self._generator: Any = None
        self._room, self._longest, self._length = (0, 0), 0, 0
        self._tokens: Tokens = np.empty((0, 0), np.int64)
        self._proposed: Tokens = np.empty(0, np.int64)

    @property
    def model(self) -> Any:
        """Return the `onnxruntime_genai.Model` itself, for other loops over the same weights in memory."""
        return self._model

    def reset(self, batch: int, capacity: int) -> None:
        """Make a new Generator, whose keys and values take `capacity` tokens from the start.

        Raises:
            UsageError: the sequence is longer than the context.
            MemoryError: there is no room for the keys and values.
        """
        check_room(GENAI_ENGINE, batch, capacity, max_length=self.max_length)
        self._generator = None  # the old one goes first: two caches may not fit
        self._longest = min(capacity + 1, self.max_length)  # the last proposal is held too
        parameters = self._runtime.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, max_length=self._longest, do_sample=False)
        self._generator = self._tried(lambda: self._runtime.Generator(self._model, parameters))
        self._room, self._length = (batch, capacity), 0
        self._tokens = np.empty((batch, capacity), np.int64)

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
        self._run(prompts)
        return self._propose()

    def step(self, tokens: Tokens) -> Tokens:
        """Append one token to each sequence [batch].

        Raises:
            QevalError: there is no room for it, the forward failed, or a batch of sequences would have to go on
                after the end-of-sequence id.
        """
        self._check(tokens[:, None])
        if (tokens != self._proposed).any() or (tokens == self._last_id).any():
            self._force(tokens)
        else:  # the generator holds these very tokens back
            self._tokens[:, self._length] = tokens
            self._length += 1
        return self._propose()

    def logits(self) -> NDArray[np.float32]:
        """Return the logits [batch, vocab] of the last token."""
        logits: NDArray[Any] = self._tried(lambda: self._generator.get_output("logits"))
        return logits[:, -1].astype(np.float32)

    def memory(self) -> Memory:
        """Return the initializers as stored, and keys and values for the whole capacity, as they are allocated."""
        batch = self._room[0] if self._generator is not None else 0
        per_token = sum(past.heads * past.head_size * np.dtype(past.dtype).itemsize for past in self._pasts)
        held = batch * self._longest
        in_use = None if self._gpu is None else bytes_in_use(self._gpu)
        return Memory(self._disk_bytes, self._weights_bytes, held * per_token, in_use)

    def close(self) -> None:
        """Let the generator go, then the model."""
        self._generator = None
        self._model = None

    @property
    def _last_id(self) -> int:
        """Return the id that stands for end-of-sequence and for padding."""
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
        # A number takes the place of what the folder says; a list would be added to it.
        ids = {"eos_token_id": self._last_id, "pad_token_id": self._last_id}
        config.overlay(json.dumps({"model": {**ids, "decoder": {"session_options": options}}}))
        model = self._tried(lambda: self._runtime.Model(config))
        if str(model.device_type).lower() != name.lower():
            raise QevalError(
                f"onnxruntime-genai runs the model on {model.device_type}, where {provider} was asked for."
            )
        return model

    def _check(self, ids: Tokens) -> None:
        assert self._generator is not None, "reset comes first"
        check_tokens(GENAI_ENGINE, ids, self._length + ids.shape[1], self._room[1], self._vocab_size)

    def _run(self, ids: Tokens) -> None:
        """Run tokens [batch, new] after those that were run before."""
        self._tried(lambda: self._generator.append_tokens(ids.astype(np.int32)))
        length = self._length + ids.shape[1]
        self._tokens[:, self._length : length], self._length = ids, length

    def _propose(self) -> Tokens:
        """Run what is held back, if anything, and pick the next token of each sequence [batch], which is held back.

        At the context's end the generator has no room for another token and doesn't pick one.
        """
        if self._length < self._longest:
            self._tried(self._generator.generate_next_token)
            self._proposed = self._tried(self._generator.get_next_tokens).astype(np.int64)
        else:
            scores = self._tried(self._generator.get_logits)
            self._proposed = scores.reshape(len(self._tokens), -1).argmax(axis=1)
        return self._proposed.copy()

    def _force(self, tokens: Tokens) -> None:
        """Run other tokens [batch] than those that are held back."""
        if len(tokens) == 1:
            self._tried(lambda: self._generator.rewind_to(self._length))
            self._run(tokens[:, None])
            return
        if (tokens == self._last_id).any():
            raise QevalError(
                f"{GENAI_ENGINE} can't go on after token {self._last_id}, the vocabulary's last, in a batch: it stands "
                "for end-of-sequence there; give other prompts, or a batch of 1."
            )
        everything = np.concatenate([self._tokens[:, : self._length], tokens[:, None]], axis=1)
        self._tried(lambda: self._generator.rewind_to(0))
        self._length = 0
        self._run(everything)

    @staticmethod
    def _tried(call: Any) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise MemoryError(f"onnxruntime-genai: {first_line_of(error)}.") from error
            raise QevalError(f"onnxruntime-genai failed: {first_line_of(error)}.") from error


def open_genai(spec: EngineSpec, place: Path) -> GenaiEngine:
    """Return the engine on the folder that `onnx_folder.prepare_genai` returned.

    Raises:
        UsageError, QevalError, MemoryError: as `GenaiEngine`.
    """
    return GenaiEngine(place, spec.provider, spec.threads, device_id_of(spec.device))
