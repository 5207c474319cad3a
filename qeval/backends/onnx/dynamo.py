"""Route B to a float ONNX graph: torch's own exporter (`torch.onnx.export`, dynamo), for families no builder knows.

The graph holds a checkpoint's model in fp32, in standard operators of opset 21, with this interface:

| name                                             | shape                                      | type    |
|--------------------------------------------------|--------------------------------------------|---------|
| `input_ids`                                      | [batch, sequence]                          | int64   |
| `attention_mask`                                 | [batch, past + sequence]                   | int64   |
| `past_key_values.{i}.key`, `.value`, each layer's | [batch, heads, past, head size]            | float32 |
| `logits`                                         | [batch, sequence, vocabulary]              | float32 |
| `present.{i}.key`, `.value`                      | [batch, heads, past + sequence, head size] | float32 |

Batch, sequence and past are free, a past of 0 tokens included, and any batch may continue a past. Positions are past,
past + 1, ... in every row, so padding belongs on the right; a mask's zeros hide those keys, ones everywhere do as well.
Keys and values are kept from the first token on: a layer's sliding window is in its mask. Where the rotary frequencies
change with the length (LongRoPE), the whole batch is turned by those of past + sequence, padding included.

How the model's tensors are found, as initializers under the names that transformers' model gives them:

- A linear's weight is the second input of `MatMul`, transposed to [inputs, outputs], and the node bears the linear's
  name. Its bias is an `Add` behind it. GPT-2's Conv1D weights have that layout from the start.
- A head tied to the embedding is `MatMul(states, Transpose(embedding))`: the one initializer, [vocabulary, width], is
  what `Gather` reads too. An untied head is a linear as any other.
- A norm's gain is a factor of `Mul`, or the second input of `LayerNormalization`. Where a model multiplies by
  1 + weight (Gemma), the initializer holds 1 + weight and has no name of the model's.
- A linear of a class of the family's own (Falcon's) is transposed likewise, but has no name of the model's.
- Any other tensor is wherever the family's code reads it.
"""

import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

from qeval.errors import QevalError
from qeval.models.trust import NO_HUB

_CHILD = "qeval.backends.onnx.dynamo_child"


def export_dynamo(checkpoint: Path, out: Path) -> None:
    """Write `out`/model.onnx and `out`/model.onnx.data, the float model of the folder `checkpoint`.

    It runs in a process of its own, whose memory (the fp32 weights, once, and some) is given back at the end.

    Raises:
        QevalError: the model can't be exported; the sentence holds the reason.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", _CHILD, str(checkpoint.resolve()), str(out.resolve())],
        env={**os.environ, **NO_HUB},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise QevalError(f"torch's ONNX exporter can't take '{checkpoint}': {_reason(done)}.")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the signal that ended the process, or the last line that it wrote to stderr."""
    if done.returncode < 0:
        cause = ", most likely for want of memory" if done.returncode == -SIGKILL else ""
        return f"its process was ended by signal {-done.returncode}{cause}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else f"its process ended with exit code {done.returncode} and said nothing"
