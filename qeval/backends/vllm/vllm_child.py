"""vLLM in a process of its own: `vllm_child.py`, started by `process.py` with an interpreter that has vLLM.

It imports nothing of qeval, whose torch and transformers may be others than vLLM's. A forward hook on the model keeps
what it returns, the final hidden states after the last norm; logits are made of them by the model's own head. Messages
are those of `process.py`: a JSON object, then the bytes of a matrix in fp32 where the object says so.
"""

import json
import os
import sys
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.platforms import current_platform


class StatesExtension:
    """Methods that every worker of vLLM is given (`worker_extension_cls`)."""

    qeval_states: list[torch.Tensor]

    def qeval_listen(self) -> int:
        """Keep what the model returns from now on; return the width of its rows of logits."""
        self.qeval_states = []
        model: Any = self.get_model()  # type: ignore[attr-defined]
        model.register_forward_hook(lambda module, inputs, output: self.qeval_states.append(_first(output).detach()))
        return int(self._qeval_logits(torch.zeros(1, self._qeval_width())).shape[-1])

    def qeval_take(self, tokens: int, positions: list[int]) -> Any:
        """Return the states at positions of the one sequence that was run since, and forget them.

        Raises:
            RuntimeError: It was not run in one forward pass.
        """
        states, self.qeval_states = self.qeval_states, []
        if len(states) != 1 or len(states[0]) < tokens:
            raise RuntimeError(f"vLLM ran a sequence of {tokens} tokens in {[len(each) for each in states]} rows")
        return states[0][torch.tensor(positions, device=states[0].device)].float().cpu().numpy()

    def qeval_logits(self, states: Any) -> Any:
        """Return the logits of states [n, width], fp32; every worker of a tensor-parallel model takes part."""
        return self._qeval_logits(torch.from_numpy(states)).cpu().numpy()

    def _qeval_logits(self, states: torch.Tensor) -> torch.Tensor:
        model: Any = self.get_model()  # type: ignore[attr-defined]
        parameter = next(each for each in model.parameters() if each.is_floating_point())
        dtype: torch.dtype = self.model_config.dtype  # type: ignore[attr-defined]
        with torch.inference_mode():
            logits: torch.Tensor = model.compute_logits(states.to(parameter.device, dtype))
        return logits.float()

    def _qeval_width(self) -> int:
        return int(self.model_config.get_hidden_size())  # type: ignore[attr-defined]


def main(address: str, key: bytes) -> None:
    """Open the model that the first message names, then answer messages until one says to close.

    Args:
        address: The socket of the process that asks.
        key: What both sides prove to know.
    """
    connection = Client(address, family="AF_UNIX", authkey=key)
    try:
        model, width = _open(json.loads(connection.recv_bytes()))
        _send(connection, {"width": width, "platform": str(current_platform.device_type)})
        while (message := json.loads(connection.recv_bytes()))["do"] != "close":
            matrix = _states(model, message) if message["do"] == "states" else _logits(model, message, connection)
            _send(connection, {"shape": list(matrix.shape)})
            connection.send_bytes(np.ascontiguousarray(matrix, np.float32).data.cast("B"))
    except Exception as error:
        _send(connection, {"error": f"{type(error).__name__}: {error}"})
        raise


def _open(options: dict[str, Any]) -> tuple[LLM, int]:
    model = LLM(**options, worker_extension_cls=f"{StatesExtension.__module__}.StatesExtension")
    return model, int(model.collective_rpc("qeval_listen")[0])


def _states(model: LLM, message: dict[str, Any]) -> Any:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    parts = []
    for tokens, positions in message["requests"]:
        model.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, use_tqdm=False)
        parts.append(model.collective_rpc("qeval_take", args=(len(tokens), positions))[0])
    return np.concatenate(parts)


def _logits(model: LLM, message: dict[str, Any], connection: Connection) -> Any:
    states = np.frombuffer(connection.recv_bytes(), np.float32).reshape(message["shape"])
    return model.collective_rpc("qeval_logits", args=(states.copy(),))[0]


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _first(output: Any) -> torch.Tensor:
    """Return the states of what a model returns, which may have others beside them."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


if __name__ == "__main__":
    # by its own name, so that workers find the extension
    sys.modules["vllm_child"] = sys.modules["__main__"]
    StatesExtension.__module__ = "vllm_child"
    main(sys.argv[1], bytes.fromhex(os.environ["QEVAL_VLLM_AUTHKEY"]))
