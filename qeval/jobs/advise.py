"""`advise`: what a variant of a finished run loses by, which treatments that calls for, and what each of them gained.

Causes are measured on the calibration text. Treatments are measured on held-out windows: the text that follows what the
run scored, or another text. So neither the choice of the variant nor that of the treatments has seen them.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from qeval.compare.chat_choice import ChatChoice
from qeval.compare.hub_access import hub_access, needs_of, needs_of_text
from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.plan import calibration_of, make_plan
from qeval.compare.run import membership, run_comparison
from qeval.compare.schemes import refuse_rotations
from qeval.compare.settings import CorpusChoice, Settings
from qeval.compare.settings_json import settings_of
from qeval.compare.tokens import each_corpus, protocol_of
from qeval.compare.variants import Workshop, check_recipes
from qeval.config import Recipe, parse_method
from qeval.errors import BrokenRecordError, QevalError, UsageError, unknown
from qeval.files.atomic import write_text
from qeval.jobs.loss_causes import CAUSE_SAMPLES, LossCauses, find_causes
from qeval.jobs.treatments import propose, recipe_fields
from qeval.models.device import release_cached
from qeval.models.info import LoadedModel
from qeval.progress import Progress
from qeval.quantize.sensitivity import trial_passes
from qeval.report.advice import Advice, FindingKind, TreatmentResult, write_advice
from qeval.report.build import build_paired
from qeval.report.diff.measure import DiffSide, judged, token_differences
from qeval.report.model import Metric, Report, VariantReport
from qeval.report.privacy import local_name
from qeval.report.render import write_report
from qeval.report.run_rows import PairedRun
from qeval.stats.flips import holm
from qeval.store.out import check_out
from qeval.store.run import RunRecord
from qeval.tasks.corpus import CHAT, bos_token, encode, load_corpus

HELD_OUT, RECIPES = "held-out", "recipes.yaml"
"""In OUT: the run on held-out windows, and the treatments as `--config` reads them."""
_TEXT = f"{HELD_OUT}.txt"
_FEWEST_WINDOWS = 4
"""With fewer a gain has no interval worth the name."""
_METHODS = ("rtn", "awq", "gptq", "smoothquant", "none")
"""Methods whose loss is looked into: a mix has its groups treated already, and other tools have ways of their own."""


@dataclass(frozen=True)
class AdviceChoice:
    """The variant to advise on (None: the one with the largest KL), the text, its windows, and the result's folder."""

    variant: str | None
    corpus: str | None
    windows: int
    out: Path
    threads: int | None
    is_offline: bool


def advise_on(run: Path, choice: AdviceChoice, progress: Progress) -> Advice:
    """Find what a variant of a finished run loses by, and measure at most three treatments on held-out windows.

    Args:
        run: The run's folder.
        choice: What is asked for.
        progress: Hears of phases and warnings.

    Raises:
        UsageError: There is no such run or variant, it is of a kind that is not looked into, or no text is left.
        QevalError: The run can't be made again, or a figure is not finite.
    """
    check_out(choice.out, "the advice", below=True)
    rows = PairedRun(run)
    folder, settings = _settings(rows.record, run)
    recipe = _recipe(settings, _variant(rows, settings, choice.variant))
    out = choice.out.absolute()
    settings = replace(settings, threads=choice.threads or settings.threads)
    if not folder.is_dir():
        raise QevalError(f"The run was started in {folder}, which is gone; its paths may start there.")
    with chdir(folder):
        advice, proposals, text = _look(settings, recipe, choice, out, progress)
        if not proposals:
            return advice
        held_out = replace(
            settings,
            recipes=(recipe, *(treated for _, treated in proposals)),
            corpus=text,
            chat=ChatChoice(),
            out=out / HELD_OUT,
            command=f"qeval advise {run} {recipe.name}",
        )
        report, scored = _score(held_out, progress, is_offline=choice.is_offline)
    advice = _with_results(advice, report, scored, recipe, proposals)
    write_advice(advice, out)
    return advice


def _settings(record: RunRecord, run: Path) -> tuple[Path, Settings]:
    """Return the folder that a run started in, and what of its settings is left: its model, recipes and texts.

    Raises:
        UsageError: Its weights can't be made again in memory.
    """
    if record.imported:
        raise UsageError(f"The run in '{run}' was imported, so there is no model to look into.")
    folder, settings = settings_of(record)
    if not settings.recipes:
        raise UsageError(f"All variants of the run in '{run}' were made elsewhere; qeval advises on those of recipes.")
    if settings.model.stream:
        raise UsageError("The run was streamed, and causes are measured in memory; compare on a machine that holds it.")
    return folder, replace(
        settings,
        variants=(),
        kv_types=(),
        tasks=("kl", "ppl"),
        backends=replace(settings.backends, names=("torch",)),
        split=False,
        workers=1,
        executor="local",
        worker_gpus=None,
    )


def _variant(rows: PairedRun, settings: Settings, name: str | None) -> str:
    """Return the variant to look into: the one that is named, else that with the largest KL of those with a recipe."""
    if name is not None:
        if name not in {each.name for each in settings.recipes}:
            raise unknown(f"variant of '{rows.folder}' that has a recipe", name, [r.name for r in settings.recipes])
        return name
    known = {recipe.name for recipe in settings.recipes if recipe.method in _METHODS and recipe.rotations is None}
    done = [each for each in rows.done if each.name in known and each.role == "variant"]
    if not done or "kl" not in rows.record.metrics:
        raise UsageError(
            f"The run in '{rows.folder}' has no variant with a KL that {', '.join(_METHODS[:-1])} or a scheme made; "
            "name one, or compare with --methods rtn --tasks kl."
        )
    return max(done, key=lambda each: float(rows.tokens(each).of("kl_nats").mean())).name


def _recipe(settings: Settings, name: str) -> Recipe:
    recipe = next(each for each in settings.recipes if each.name == name)
    if recipe.method not in _METHODS:
        raise UsageError(f"'{name}': {recipe.method} is not looked into; name a variant of {', '.join(_METHODS)}.")
    refuse_rotations([recipe], {}, "qeval advise looks into")
    return recipe


def _look(
    settings: Settings, recipe: Recipe, choice: AdviceChoice, out: Path, progress: Progress
) -> tuple[Advice, list[tuple[FindingKind, Recipe]], CorpusChoice]:
    """Return the findings of a recipe, the treatments, and the held-out text; the model is let go of."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    needs = [*needs_of(settings), *needs_of_text(choice.corpus or "")]
    with hub_access(needs, progress, is_offline=choice.is_offline):
        loaded, model = source_of_model(settings.model)
        tell_warnings(loaded, progress)
        corpus, text = _held_out(settings.corpus, choice, loaded, out)  # refused before the long measurement
        calibration = calibration_of(settings.calibration, loaded)
        workshop = Workshop(model, lambda: calibration, settings.seed, progress)
        rounds_weights = recipe.quant_method.rounding != "none"
        source = workshop.calibrated_source(parse_method("awq") if rounds_weights else recipe)  # with its statistics
        if recipe.quant_method.mixed:  # what a mix measures of each group is this very thing
            source = workshop.remembering(source, replace(recipe.weights_alone, method=recipe.quant_method.mixed))
        units = trial_passes(source.description) if rounds_weights else 1
        with progress.phase(f"causes of {recipe.name}'s loss", units) as advance:
            causes = find_causes(source, recipe, advance)
        proposals = propose(source, recipe, causes, lambda each: check_recipes([each], model, len(source.samples)))
    name = local_name(settings.model.name, loaded.info.source)
    advice = _advice(name, recipe, causes, str(calibration.record["source"]))
    write_advice(advice, out)  # what is known by now; it makes the folder qeval's own too
    if proposals:
        write_text(out / RECIPES, yaml.safe_dump({"variants": [recipe_fields(each) for _, each in proposals]}))
    if text is not None:
        write_text(out / _TEXT, text)
    workshop.close()
    release_cached()
    return advice, proposals, corpus


def _advice(model: str, recipe: Recipe, causes: LossCauses, calibration: str) -> Advice:
    notes = [f"Causes are measured on the first {CAUSE_SAMPLES} calibration sequences, each part alone."]
    if recipe.quant_method.rounding in ("sequential", "smoothed"):
        notes.append(f"{recipe.name}: each group alone is rounded to nearest, as {recipe.method} has no such form.")
    return Advice(
        model=model, variant=recipe.name, calibration=calibration, positions=causes.positions,
        parts=dict(causes.parts), findings=list(causes.findings), notes=notes,
    )  # fmt: skip


def _held_out(
    scored: CorpusChoice, choice: AdviceChoice, loaded: LoadedModel, out: Path
) -> tuple[CorpusChoice, str | None]:
    """Return the text to measure treatments on: another one that is named, else what follows the run's windows.

    The second is the text that goes into a file of `out`, None for a named one.

    Raises:
        UsageError: Nothing is left of the run's text, or the named one is the run's own.
    """
    first = next((each for each in each_corpus(scored) if each.corpus != CHAT), None)
    used = None if first is None else protocol_of(first, loaded)
    if choice.corpus is not None:
        if used is not None and load_corpus(choice.corpus).sha256 == load_corpus(used.corpus).sha256:
            raise UsageError(f"--corpus {choice.corpus} is what the run scored; name another text, or leave it out.")
        sized = first if first is not None and first.protocol is None else CorpusChoice()
        return replace(sized, corpus=choice.corpus, max_windows=choice.windows), None
    if first is None or used is None or used.convention.scoring == "rolling":
        raise UsageError("No text follows what the run scored (answers, or whole pages); name one with --corpus.")
    text, bos = load_corpus(used.corpus).text, bos_token(loaded.tokenizer, first.bos)
    last = used.windows(encode(loaded.tokenizer, text), bos=bos, max_windows=first.max_windows).windows[-1]
    rest = _rest(text, last.offset + len(last.tokens), loaded)
    try:
        available = used.windows(encode(loaded.tokenizer, rest), bos=bos).available
    except UsageError:
        available = 0
    if available < _FEWEST_WINDOWS:
        raise UsageError(
            f"The run scored its text but for {available} windows, and gains need {_FEWEST_WINDOWS} that it did not "
            "score; name another text with --corpus, such as code."
        )
    following = CorpusChoice(
        str(out / _TEXT), window=used.window, stride=used.stride, max_windows=choice.windows, bos=first.bos,
        convention=used.convention.name,
    )  # fmt: skip
    return following, rest


def _rest(text: str, tokens: int, loaded: LoadedModel) -> str:
    """Return the text from the first line that begins after so many tokens."""
    starts = [place + 1 for place, letter in enumerate(text) if letter == "\n"]
    at = bisect_left(starts, tokens, key=lambda start: len(encode(loaded.tokenizer, text[:start])))
    return text[starts[at] :] if at < len(starts) else ""


def _score(settings: Settings, progress: Progress, *, is_offline: bool) -> tuple[Report, PairedRun]:
    """Compare the variant with its treatments, and write the report of that."""
    with hub_access(needs_of(settings), progress, is_offline=is_offline):
        plan = make_plan(settings, progress=progress)
        with membership(plan, progress) as ledger:
            run_comparison(plan, progress, ledger)
            rows = PairedRun(settings.out, is_running=True)
            report = build_paired(rows)
            write_report(report, settings.out, rows)
    return report, rows


def _with_results(
    advice: Advice, report: Report, rows: PairedRun, recipe: Recipe, proposals: Sequence[tuple[FindingKind, Recipe]]
) -> Advice:
    """Return the advice with what each treatment gained."""
    by_name = {variant.name: variant for variant in report.variants}
    own = by_name[recipe.name]
    if own.status != "done":
        raise BrokenRecordError(f"'{recipe.name}' failed on the held-out windows: {own.error}")
    results = _results(rows, own, [(kind, by_name[treated.name]) for kind, treated in proposals])
    notes = [*advice.notes, *(f"{each.name}: {each.void}" for each in report.variants if each.void)]
    return advice.model_copy(
        update={
            "results": results,
            "protocol": rows.record.protocol.name if rows.record.protocol else None,
            "windows": rows.record.protocol.windows if rows.record.protocol else None,
            "kl_nats": own.metrics.get("kl_nats"),
            "bits_per_weight": own.bits_per_weight,
            "notes": notes,
        }
    )


def _results(
    rows: PairedRun, own: VariantReport, others: Sequence[tuple[FindingKind, VariantReport]]
) -> list[TreatmentResult]:
    """Return what each treated variant gained, tested together."""
    side = DiffSide(rows, rows.variant(own.name))
    changes = {
        other.name: token_differences(side, DiffSide(rows, rows.variant(other.name)), ["kl_nats"])[0]
        for _, other in others
        if other.status == "done"
    }
    tested = [name for name, change in changes.items() if change.p_value is not None]
    p_values = dict(zip(tested, holm([changes[name].p_value or 0.0 for name in tested]), strict=True))
    results = []
    for kind, other in others:
        if other.name not in changes:
            results.append(TreatmentResult(name=other.name, finding=kind, error=other.error))
            continue
        change = judged(changes[other.name], p_values.get(other.name))
        results.append(
            TreatmentResult(
                name=other.name, finding=kind, bits_per_weight=other.bits_per_weight,
                kl_nats=other.metrics.get("kl_nats"), gain_nats=_negated(change.difference),
                p_adjusted=change.p_adjusted, verdict=change.verdict,
            )
        )  # fmt: skip
    return results


def _negated(change: Metric) -> Metric:
    """Return a paired change of KL as a gain."""
    values: Mapping[str, float | None] = {"value": change.value, "low": change.high, "high": change.low}
    turned = {name: None if value is None else -value for name, value in values.items()}
    return change.model_copy(update={**turned, "better": "higher"})
