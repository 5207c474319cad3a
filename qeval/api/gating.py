"""Run and gate in one go: as many rows are scored as the policy needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeval.api.folders import check_verdict_files, policy_of, write_verdict
from qeval.api.keywords import run_settings
from qeval.api.process import call_text, torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import PathLike
from qeval.compare.defaults import takes_shipped_texts
from qeval.compare.settings import AUTO
from qeval.config import Defaults, parse_method
from qeval.progress import Logged, Progress
from qeval.store.out import check_out

if TYPE_CHECKING:
    from qeval.gate.policy import Policy
    from qeval.gate.verdict import GateVerdict


def gate_model(
    model: str,
    policy: "Policy | PathLike | Mapping[str, Any]",
    *,
    method: str,
    revision: str | None = None,
    device: str = AUTO,
    compute: str | None = None,
    stream: bool = False,
    max_memory: str | int | None = None,
    device_map: str | None = None,
    corpus: PathLike | None = None,
    protocol: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    mmlu_dir: PathLike | None = None,
    limit: int | None = None,
    shots: int = 5,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    threads: int | None = None,
    seed: int = 0,
    out: PathLike | None = None,
    junit: PathLike | None = None,
    markdown: PathLike | None = None,
    summary: PathLike | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> "GateVerdict":
    """Quantize a model one way, score as many rows as the policy's rules take, and judge them.

    The keywords are the flags of `qeval gate`; `compare` describes those that both have, `gate` the files.

    Args:
        model: A name of `qeval models`, a hub id, a folder or a .gguf file.
        policy: A YAML file of margins, or its content as a dict; it says which tasks are scored.
        method: One method, such as "awq:int4-g64".
        out: The run's folder; default: gates/ and the names of model and method.

    Raises:
        UsageError: Something that was asked for is not there or does not fit, or there are too few windows.
        QevalError: The run failed.
    """
    values = dict(locals())
    command = command or call_text(gate_model, values)
    check_verdict_files(junit, markdown, summary)
    rules, name = policy_of(policy), str(model)
    shipped = takes_shipped_texts(name, offline=offline)
    from qeval.gate.sequential_run import run_and_judge, tasks_of  # noqa: PLC0415 - torch takes seconds to import

    recipe = parse_method(method, Defaults(None, "measured", False))
    settings = run_settings(
        values,
        shipped=shipped,
        recipes=(recipe,),
        variants=(),
        workers=1,  # questions are drawn in small steps
        tasks=tasks_of(rules, recipe.name),
        out=read.path(out) if out else Path("gates") / f"{read.slug(name)}-{read.slug(method)}",
        command=command,
    )
    progress = progress or Logged()
    from qeval.compare.hub_access import hub_access, needs_of  # noqa: PLC0415 - the client of the hub
    from qeval.compare.machine import settings_here  # noqa: PLC0415

    check_out(settings.out, "the report")  # before the hub is asked
    with hub_access(needs_of(settings), progress, is_offline=offline), torch_settings_restored():
        verdict = run_and_judge(settings_here(settings, progress), rules, progress)
    write_verdict(verdict, junit, markdown, summary)
    return verdict
