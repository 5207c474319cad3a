"""The backend `vllm`: checkpoints scored by vLLM's own kernels, exactly over the whole vocabulary.

A state is the final hidden state that vLLM's model returns, after the last norm; vLLM's own head makes logits of it.
Sequences run whole, one after another, without its prefix cache: what is cached depends on what was run before.
CUDA graphs and torch.compile are off (`enforce_eager`), since a hook reads the states.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import Prefix, Saved, SessionDefaults, Target
from qeval.backends.vllm.process import VllmProcess, run_vllm, vllm_version
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import block_rows
from qeval.models.info import LoadedModel
from qeval.models.trust import clean_copy
from qeval.progress import Progress
from qeval.quant.scheme import Scheme
from qeval.store.run import RuntimeRecord
from qeval.types import Request, TokenIds

VLLM = "vllm"
"""The name that --backend takes and rows carry."""
LONGEST = 8192
"""The tokens that keys and values have room for, where the model's context is longer."""
_STATES_VERSION = 1
"""Part of every key: raise it when what is read of vLLM changes."""
_FREE_SHARE = 0.9
"""The part of a GPU's free memory that vLLM may take: the baseline lies beside it."""


@dataclass(frozen=True)
class VllmOptions:
    """The options of vLLM that a user sets.

    Attributes:
        python: The interpreter that has vLLM.
        dtype: The type that it computes in, `auto` for the checkpoint's.
        tensor_parallel: The number of GPUs that a layer is split over.
        kv_cache: The type of keys and values: `auto` (the model's), `fp8` and others that vLLM knows.
    """

    python: str
    dtype: str = "auto"
    tensor_parallel: int = 1
    kv_cache: str = "auto"


@dataclass(frozen=True, eq=False)
class VllmPrefix:
    """Token ids that requests continue; they run with each of them."""

    tokens: TokenIds

    @property
    def length(self) -> int:
        """The prefix's length in tokens."""
        return len(self.tokens)


class VllmSession(SessionDefaults):
    """An open checkpoint in vLLM; states are final hidden states, logits vLLM's own head's."""

    packs = True

    def __init__(self, process: VllmProcess, *, ids: int, max_length: int) -> None:
        """`ids` beyond the first so many are left out of the logits: they are padding."""
        self._process, self._ids, self._max_length = process, ids, max_length

    @property
    def max_length(self) -> int:
        """The longest sequence that keys and values have room for."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self._ids

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return block_rows(self._ids)

    @property
    def platform(self) -> str:
        """The platform that vLLM runs on: cpu, cuda."""
        return self._process.platform

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> VllmPrefix:
        """Return a prefix, after another if one is given.

        Raises:
            QevalError: It is longer than the context.
        """
        prefix = VllmPrefix((*_tokens_of(outer), *tokens))
        self._check_length(prefix.length)
        return prefix

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the final states at each request's positions, [positions, width] fp32.

        Raises:
            QevalError: A sequence is longer than the context, or vLLM failed.
        """
        whole = [request.after(_tokens_of(prefix)) for request in requests]
        self._check_length(max(len(request.tokens) for request in whole))
        states = self._process.states([(request.tokens, request.positions) for request in whole])
        return list(torch.split(states, [len(request.positions) for request in whole]))

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, width], by vLLM's head."""
        return self._process.logits(states)[:, : self._ids]

    def _check_length(self, length: int) -> None:
        if length > self._max_length:
            raise QevalError(f"A sequence of {length} tokens is longer than the context of {self._max_length}.")


@dataclass(frozen=True, eq=False)
class VllmBackend:
    """Opens checkpoints in vLLM: the baseline's own, and those that --variant names.

    Attributes:
        loaded: The baseline.
        ids: The size of the baseline's vocabulary.
        device: As torch names it.
        options: The user's.
    """

    loaded: LoadedModel
    ids: int
    device: str
    options: VllmOptions
    name = VLLM
    fake_quantizes = False
    warnings = ()

    @property
    def max_length(self) -> int:
        """The longest sequence that is run."""
        return min(self.loaded.info.context_length, LONGEST)

    def identity(self, target: Target) -> dict[str, Any]:
        """Return everything about vLLM that changes a number."""
        options = self.options
        computed = {"dtype": options.dtype, "tensor_parallel": options.tensor_parallel, "cache": options.kv_cache}
        kind = self.device.partition(":")[0]
        runtime = f"vllm {vllm_version(options.python)}"
        return {"backend": {"runtime": runtime, "device": kind, **computed}, "states": _STATES_VERSION}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: a checkpoint is read when it is opened."""

    @contextmanager
    def open(self, target: Target) -> Iterator[VllmSession]:
        """Open a target's checkpoint in a process of vLLM's, which ends with the block.

        Raises:
            UsageError: The target is no checkpoint, or gives logits of too few ids.
            QevalError: vLLM can't open it.
        """
        source = target_folder(target, self.loaded)
        with (
            TemporaryDirectory() as into,
            run_vllm(
                self.options.python, self._keywords(clean_copy(source, Path(into))), self._environment()
            ) as process,
        ):
            if process.width < self.ids:
                raise UsageError(
                    f"'{source}' gives logits of {process.width} ids in vLLM, the baseline of {self.ids}: the two "
                    "cannot be compared."
                )
            yield VllmSession(process, ids=self.ids, max_length=self.max_length)

    def describe(self, session: VllmSession, target: Target) -> RuntimeRecord:
        """Return how an open checkpoint is run."""
        options = self.options
        cache = "of the model's type" if options.kv_cache == "auto" else options.kv_cache
        split = f", each layer on {options.tensor_parallel} GPUs" if options.tensor_parallel > 1 else ""
        dtype = "the checkpoint's type" if options.dtype == "auto" else options.dtype
        return RuntimeRecord(
            runtime=f"vllm {vllm_version(options.python)}",
            provider=session.platform.upper(),
            nodes={},
            exporter=None,
            format=None,
            accuracy_level=None,
            shares_prefixes="none",
            facts=[
                f"Computed in {dtype}{split}; keys and values {cache}.",
                "Without CUDA graphs, torch.compile and the prefix cache.",
            ],
        )

    def _keywords(self, folder: Path) -> dict[str, Any]:
        """Return the keywords of `vllm.LLM`: a sequence runs in one forward pass, and one token is added to it."""
        keywords = {
            "model": str(folder.resolve()),
            "skip_tokenizer_init": True,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "dtype": self.options.dtype,
            "tensor_parallel_size": self.options.tensor_parallel,
            "kv_cache_dtype": self.options.kv_cache,
            "max_model_len": self.max_length + 1,
            "max_num_batched_tokens": self.max_length + 1,
            "max_num_seqs": 1,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "seed": 0,
        }
        if self.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(torch.device(self.device))
            keywords["gpu_memory_utilization"] = round(_FREE_SHARE * free / total, 3)
        return keywords

    def _environment(self) -> dict[str, str]:
        # one token more than the model's context is planned for, and never fed
        variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        if self.device == "cpu":
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        kind, _, index = self.device.partition(":")
        return variables | ({"CUDA_VISIBLE_DEVICES": index} if kind == "cuda" and index else {})


def target_folder(target: Target, loaded: LoadedModel) -> Path:
    """Return the folder of a target's checkpoint, of the baseline's without a target.

    Raises:
        UsageError: There is none that vLLM could read.
    """
    if target is None:
        return loaded.folder
    if isinstance(target, Saved) and target.checkpoint is not None:
        if target.effective_scheme == Scheme() and target.scheme is not None:
            raise UsageError("vLLM runs a checkpoint as a whole; leave --external-parts weights and split out.")
        return target.checkpoint
    raise UsageError(
        "vLLM runs checkpoints: write the variant by `qeval export --to hf --out FOLDER`, and give it as "
        "--variant NAME=FOLDER."
    )


def _tokens_of(prefix: Prefix | None) -> TokenIds:
    if prefix is None:
        return ()
    if not isinstance(prefix, VllmPrefix):
        raise TypeError("A prefix belongs to the session that made it.")
    return prefix.tokens
