"""A model as lm-evaluation-harness takes one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeval.compare.arguments import compute_type
from qeval.compare.settings import AUTO, ModelChoice
from qeval.errors import UsageError
from qeval.progress import Logged

if TYPE_CHECKING:
    from qeval.score.lm import QevalLM
    from qeval.tasks.corpus import BosPolicy


def lm_eval_model(
    model: Any,
    tokenizer: Any = None,
    *,
    bos: "BosPolicy" = "auto",
    batch_tokens: int = 2048,
    device: str = AUTO,
    compute: str | None = None,
) -> "QevalLM":
    """Return a model for `lm_eval.simple_evaluate(model=...)`, run by qeval with prefixes shared.

    It scores continuations and whole texts, and gives greedy answers in batches.

    Args:
        model: A session of a backend, a transformers causal language model that is loaded already, or a name, hub id,
            folder or .gguf file.
        tokenizer: The tokenizer of a session or of a loaded model.
        bos: Whether contexts begin with BOS: auto (as the tokenizer does), always, never.
        batch_tokens: Tokens a batch.
        device: Where a model that is named is loaded; others stay where they are.
        compute: fp32, bf16 or fp16; default: fp32 on the CPU, elsewhere the checkpoint's.

    Raises:
        UsageError: The model can't be loaded or scored, or its tokenizer is missing.
    """
    from qeval.backends.base import Session  # noqa: PLC0415 - torch and lm-eval take seconds to import
    from qeval.backends.torch import TorchSession  # noqa: PLC0415
    from qeval.compare.loading import source_of_model  # noqa: PLC0415
    from qeval.compare.machine import model_here  # noqa: PLC0415
    from qeval.models.in_memory import memory_model  # noqa: PLC0415
    from qeval.models.vocabulary import end_tokens  # noqa: PLC0415
    from qeval.score.lm import QevalLM  # noqa: PLC0415

    if isinstance(model, Session):
        if tokenizer is None:
            raise UsageError("A session knows no texts: give the tokenizer of its model.")
        return QevalLM(model, tokenizer, bos=bos, batch_tokens=batch_tokens)  # it ends answers at the tokenizer's EOS
    is_named = isinstance(model, str | Path) and tokenizer is None
    memory = None if is_named else memory_model(model, tokenizer, device=device)
    place = device if memory is None else str(memory.device)
    choice = ModelChoice(memory.name if memory else str(model), None, place, compute_type(compute))
    loaded, source = source_of_model(model_here(choice, Logged()), memory)
    stops = end_tokens(loaded.model, loaded.tokenizer)
    session = TorchSession(loaded.model, source.head)
    return QevalLM(session, loaded.tokenizer, bos=bos, batch_tokens=batch_tokens, stops=stops)
