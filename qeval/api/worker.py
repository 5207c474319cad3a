"""One comparison as a process of a sweep: a job in JSON as its argument, events in JSON on stdout, one a line.

Events: {"event": "warning", "message"}, then {"event": "done"} or {"event": "failed", "error"}. What libraries print
to stdout goes to stderr, so that no event is cut in two.
"""

import json
import os
import signal
import sys
from types import FrameType
from typing import Any

from qeval.api.comparison import compare
from qeval.errors import QevalError, in_a_line
from qeval.progress import Silent

_TERMINATED = 143


class _Events(Silent):
    """Writes warnings as events."""

    def __init__(self) -> None:
        """Take stdout for events, and give stderr to whatever else prints."""
        super().__init__()
        self._stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(self, event: str, **content: Any) -> None:
        """Write one event."""
        self._stream.write(json.dumps({"event": event, **content}) + "\n")
        self._stream.flush()

    def warn(self, message: str) -> None:
        """Remember the warning and write it."""
        super().warn(message)
        self.write("warning", message=message)


def main() -> int:
    """Compare as the argument says, and return the exit code."""
    job, events = json.loads(sys.argv[1]), _Events()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run = compare(job["model"], **job["options"], progress=events)
    except KeyboardInterrupt:
        return _TERMINATED
    except QevalError as error:
        events.write("failed", error=str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, one line and an exit code
        events.write("failed", error=in_a_line(error))
        return QevalError.exit_code
    events.write("done")
    return QevalError.exit_code if run.failed else 0


def _interrupt(number: int, _: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that temporary files go."""
    del number
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
