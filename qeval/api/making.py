"""Make variants and what is known of them: quantize, export, and measure each group's sensitivity."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from qeval.api.keywords import calibration_of_keywords
from qeval.api.process import torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike
from qeval.compare.defaults import takes_shipped_texts
from qeval.compare.options import check_least, flag_of, from_keywords
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import AUTO, BackendChoice, ExportChoice, ExportForm, ModelChoice
from qeval.config import parse_budget, parse_method
from qeval.errors import UsageError
from qeval.paths import check_new_folder
from qeval.progress import Logged, Progress
from qeval.store.out import check_out

if TYPE_CHECKING:
    from qeval.results import ExportedModel, QuantizedVariant, SensitivityMap

_HOLDS: Mapping[ExportForm, str] = {"onnx": "the graph", "hf": "the checkpoint", "gguf": "the GGUF file"}
"""The purpose of an export's folder, by its form."""


def quantize(
    model: str,
    *,
    method: str,
    revision: str | None = None,
    device: str = AUTO,
    compute: str | None = None,
    stream: bool = False,
    max_memory: str | int | None = None,
    device_map: str | None = None,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    budget: str | float | None = None,
    importance: str = "measured",
    quantize_head: bool = False,
    threads: int | None = None,
    seed: int = 0,
    out: PathLike | None = None,
    progress: Progress | None = None,
) -> "QuantizedVariant":
    """Quantize a model one way and write the variant: packed integers, scales, zero points, manifest.

    The keywords are the flags of `qeval quantize`; `compare` describes those that both have.

    Args:
        model: A name of `qeval models`, a hub id, a folder or a .gguf file.
        method: One method, such as "awq:int4-g64".
        out: The variant's folder; default: variants/ and the names of model and method.

    Returns:
        The variant's name, folder and manifest.

    Raises:
        UsageError: The folder is taken, or the model can't be loaded, streamed or quantized so.
    """
    values = dict(locals())
    options = from_keywords(RecipeChoice, values)
    recipe = parse_method(method, options.defaults)
    options.check_used([recipe])
    folder = read.path(out) if out else Path("variants") / f"{read.slug(str(model))}-{read.slug(method)}"
    choice = from_keywords(ModelChoice, values)
    text = calibration_of_keywords(values, shipped=takes_shipped_texts(str(model), offline=offline))
    progress, threads = progress or Logged(), read.few_threads(threads)
    from qeval.compare.hub_access import hub_access, needs_of_calibration  # noqa: PLC0415 - the client of the hub

    check_new_folder(folder, "the variant")  # before the hub is asked
    with hub_access(needs_of_calibration(text, [recipe]), progress, is_offline=offline), torch_settings_restored():
        from qeval.compare.machine import model_here  # noqa: PLC0415 - torch takes seconds to import
        from qeval.jobs.quantize import make_variant  # noqa: PLC0415
        from qeval.results import QuantizedVariant  # noqa: PLC0415

        manifest = make_variant(
            model_here(choice, progress), recipe, text, folder, threads=threads, seed=seed, progress=progress
        )
    return QuantizedVariant(recipe.name, folder, manifest)


def export(
    model: str,
    *,
    method: str,
    to: str = "onnx",
    run: PathLike | None = None,
    revision: str | None = None,
    device: str = AUTO,
    compute: str | None = None,
    ep: str = AUTO,
    exporter: str = "auto",
    format: str = "nbits",
    accuracy_level: int = 1,
    precision: str | None = None,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    budget: str | float | None = None,
    importance: str = "measured",
    quantize_head: bool = False,
    threads: int | None = None,
    seed: int = 0,
    out: PathLike | None = None,
    progress: Progress | None = None,
) -> "ExportedModel":
    """Quantize a model one way and write it as an ONNX folder, a checkpoint for vLLM or a GGUF file.

    The keywords are the flags of `qeval export`; `compare` describes those that both have. `compute` belongs to "hf"
    and "gguf"; ep, exporter, format, accuracy_level and precision belong to "onnx".

    Args:
        model: A name of `qeval models`, a hub id, a folder or a .gguf file.
        method: One method, or "float".
        to: "onnx", which onnxruntime-genai loads; "hf", which transformers and vLLM load with compressed-tensors; or
            "gguf", which llama.cpp loads.
        run: With "hf" or "gguf" the folder of a finished run that scored this very variant: its card becomes README.md.
        accuracy_level: 1 (fp32 activations) or 4 (int8 activations).
        out: The folder; default: the form (onnx/, hf/, gguf/) and the names of model and method.

    Returns:
        The folder and its manifest: of ONNX with the parity with the same weights in torch, else with what was read
        back and compared.

    Raises:
        UsageError: The folder is taken, the extra is not installed, or the model can't be exported so.
        QevalError: What was read back is not what was written.
    """
    values = dict(locals())
    chosen = from_keywords(ExportChoice, values)
    form = chosen.to
    options = from_keywords(RecipeChoice, values)
    recipe = None if method == "float" else parse_method(method, options.defaults)
    recipes = [recipe] if recipe else []
    options.check_used(recipes)
    _check_flags(form, values)
    choice = from_keywords(BackendChoice, values, names=("ort",))
    if form == "onnx":
        from qeval.backends.onnx.packages import require_onnx  # noqa: PLC0415 - an extra

        require_onnx()
    folder = read.path(out) if out else Path(form) / f"{read.slug(str(model))}-{read.slug(method)}"
    text = calibration_of_keywords(values, shipped=takes_shipped_texts(str(model), offline=offline))
    progress, threads = progress or Logged(), read.few_threads(threads)
    from qeval.compare.hub_access import hub_access, needs_of_calibration  # noqa: PLC0415 - the client of the hub

    check_new_folder(folder, _HOLDS[form])  # before the hub is asked
    with hub_access(needs_of_calibration(text, recipes), progress, is_offline=offline), torch_settings_restored():
        from qeval.compare.machine import backends_here, model_here  # noqa: PLC0415
        from qeval.results import ExportedModel  # noqa: PLC0415

        if form == "onnx":
            from qeval.jobs.export import export_variant  # noqa: PLC0415 - an extra

            # fp32 whatever the device: the graph is held against torch's answers
            exact = model_here(from_keywords(ModelChoice, values, compute="float32"), progress)
            runtime = backends_here(choice, exact.device)
            graph = export_variant(exact, recipe, text, runtime, folder, threads=threads, seed=seed, progress=progress)
            return ExportedModel(folder, graph)
        from qeval.jobs.publish import publish_variant  # noqa: PLC0415

        here = model_here(from_keywords(ModelChoice, values), progress)
        published = publish_variant(
            form, here, recipe, text, folder, run=chosen.run, threads=threads, seed=seed, progress=progress
        )
        return ExportedModel(folder, published)


def _check_flags(form: ExportForm, values: Mapping[str, object]) -> None:
    """Refuse keywords that belong to another form than the one that is written.

    Raises:
        UsageError: It names their flags.
    """
    others = ("compute", "run") if form == "onnx" else ("ep", "exporter", "format", "accuracy_level", "precision")
    defaults = signature(export).parameters
    if flags := [flag_of(name) for name in others if values[name] != defaults[name].default]:
        rest = "hf and gguf" if form == "onnx" else "onnx"
        raise UsageError(f"{', '.join(flags)}: not with --to {form}; this is for {rest}, so leave it out.")


def sensitivity(
    model: str,
    *,
    method: str = "rtn",
    budgets: Names | None = None,
    formats: str | None = None,
    revision: str | None = None,
    device: str = AUTO,
    compute: str | None = None,
    device_map: str | None = None,
    calibration: PathLike | None = None,
    calibration_samples: int | None = None,
    calibration_length: int = 512,
    calibrate_all_experts: bool = False,
    offline: bool = False,
    measured_samples: int = 10,
    threads: int | None = None,
    seed: int = 0,
    out: PathLike | None = None,
    progress: Progress | None = None,
) -> "SensitivityMap":
    """Measure each group of linears alone quantized and left in float, and list what a mix would pick.

    The keywords are the flags of `qeval sensitivity`; the same call goes on where it stopped.

    Args:
        model: A name of `qeval models`, a hub id, a folder or a .gguf file.
        method: rtn or awq, with any grid.
        budgets: Sizes of a mix in bits per weight; default: five in between.
        formats: What a mix chooses among, such as int4-g128/nvfp4/bf16; default: the method's grid and INT8.
        measured_samples: Calibration sequences that each KL (nats) is measured on.
        out: The folder; default: reports/ and the model's name.

    Returns:
        The folder, the page, and the effects of every group.

    Raises:
        UsageError: A method whose groups are not made one by one, or a budget that no choice meets.
        BrokenRecordError: What was measured before is torn.
    """
    values = dict(locals())
    folder = read.path(out) if out else Path("reports") / f"{read.slug(str(model))}-sensitivity"
    check_out(folder, "the maps")  # before the hub is asked
    choice, recipe = from_keywords(ModelChoice, values), parse_method(method)
    sizes = [parse_budget(each, "--budgets") for each in read.joined(budgets).split(",") if each.strip()]
    text = calibration_of_keywords(values, shipped=takes_shipped_texts(str(model), offline=offline))
    check_least("--measured-samples", measured_samples, 1)
    progress, threads = progress or Logged(), read.few_threads(threads)
    from qeval.compare.hub_access import hub_access, needs_of_calibration  # noqa: PLC0415 - the client of the hub

    with hub_access(needs_of_calibration(text), progress, is_offline=offline), torch_settings_restored():
        from qeval.compare.machine import model_here  # noqa: PLC0415 - torch takes seconds to import
        from qeval.jobs.sensitivity import measure_sensitivity  # noqa: PLC0415
        from qeval.report.sensitivity import write_sensitivity  # noqa: PLC0415
        from qeval.results import SensitivityMap  # noqa: PLC0415

        effects = measure_sensitivity(
            model_here(choice, progress),
            recipe,
            text,
            sizes,
            folder,
            formats=[] if formats is None else formats.split("/"),
            measured_on=measured_samples,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    return SensitivityMap(folder, write_sensitivity(effects, folder), effects)
