"""`qeval models --check`: what works for which family, found by doing it on a tiny model of random weights.

No table of claims: every cell is a check that ran. One that fails says what it saw; one that can't apply says why.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from qeval.backends.install import scaled_input
from qeval.backends.onnx.packages import require_builder, require_dynamo
from qeval.backends.torch import TorchBackend
from qeval.config import parse_method
from qeval.errors import QevalError, UsageError, unknown
from qeval.methods import FLOAT_REASONS
from qeval.metrics.tokens import mean_kl
from qeval.models.families import FAMILIES, byte_tokenizer, tiny_family
from qeval.models.load import load_model
from qeval.models.silence_transformers import quiet
from qeval.models.source import resolve
from qeval.models.structure.graph import Fold, Group, describe_model
from qeval.models.structure.head import head_of
from qeval.models.structure.weight_views import modules_of, weights_of
from qeval.progress import Progress
from qeval.quant.awq import ScaleChoice
from qeval.quant.grid import parse
from qeval.quant.variant import Variant
from qeval.quantize.build import build_variant, quantizable, source_of
from qeval.quantize.patching import replace_values
from qeval.quantize.scaling import Scaled, Scales, explicit_scales, folded_floats, row_divisors
from qeval.quantize.statistics import Statistics, collect
from qeval.types import Request

EXACT_NATS, ALIKE, SAME_GRAPH = 1e-5, 1e-4, 1e-8
"""Of the largest state, in logits, and in nats: what folding, sharing and exporting may change."""
_SAMPLES, _LENGTH = 6, 48
_PREFIXES, _RESTS = (7, 23), (5, 1, 12)
"""Tokens: shorter and longer than the tiny models' windows of 8."""
_GRIDS = ("int4-g32", "int4-channel", "int4-tensor", "int8-g32")
_FINER = 0.25
"""INT8's KL is at most this share of INT4's: 16 steps in the place of one."""
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 264}
"""The model builder needs them, and room for the token that Qwen2's tokenizer adds."""

FamilyStatus = Literal["works", "fails", "cannot"]


@dataclass(frozen=True)
class CheckCell:
    """The result of one check of one family: a figure, what went wrong, or why it does not apply."""

    status: FamilyStatus
    line: str


FamilyMatrix = Mapping[str, Mapping[str, CheckCell]]
"""By family and check."""


class WrongError(QevalError):
    """A check saw what it should not."""


class InapplicableError(UsageError):
    """A check does not apply; the sentence says why."""


class Bench:
    """A tiny model with all that the checks need, made once."""

    def __init__(self, name: str, model: Any = None) -> None:
        """`model`: another than the one of the family of this name."""
        self.name, self.model = name, model or tiny_family(name)
        self.description, self.head = describe_model(self.model), head_of(self.model)
        self.backend = TorchBackend(self.model, self.description, self.head, torch.float32)
        self.samples = [_tokens(_LENGTH, seed) for seed in range(_SAMPLES)]
        self.request = Request(_tokens(40, seed=99), tuple(range(40)))

    @cached_property
    def statistics(self) -> Statistics:
        """The statistics of inputs that AWQ needs."""
        return collect(self.model, self.description, self.samples, 0, lambda done: None)

    @cached_property
    def states(self) -> Tensor:
        """The baseline's, of the request."""
        with self.backend.open(None) as session:
            return session.states([self.request])[0]

    def variant(self, method: str) -> Variant:
        """Return what a method makes of the model."""
        recipe = parse_method(method)
        statistics = self.statistics if recipe.needs_statistics else {}
        source = source_of(self.model, self.description, self.head, self.samples, statistics)
        return build_variant(source, recipe, "key", lambda done: None)

    def kl(self, variant: Variant) -> float:
        """Return the mean KL in nats of a variant over the request."""
        with self.backend.open(variant) as session:
            states = session.states([self.request])[0]
        if not bool(torch.isfinite(states).all()):
            raise WrongError("its states are not finite")
        return mean_kl(self.head.logits, self.states, self.head.logits, states)


FamilyCheck = Callable[[Bench], str]
"""Returns a figure. Raises an InapplicableError, or whatever goes wrong."""


def _quantizer(method: str) -> FamilyCheck:
    """Return the check of a method in blocks (a row's last one is short), per channel and per tensor, and at INT8."""

    def check(bench: Bench) -> str:
        blocks, _, _, fine = (_quantized(bench, f"{method}:{grid}") for grid in _GRIDS)
        if not fine <= _FINER * blocks:
            raise WrongError(f"INT8 has a KL of {fine:.2g} nats, INT4 one of {blocks:.2g}")
        return f"KL {blocks:.2g}, at INT8 {fine:.1g} nats"

    return check


def _mixed(bench: Bench) -> str:
    """Under the positional rule's size, by measured sensitivities."""
    low, mixed = (_quantized(bench, method) for method in ("awq:g32", "mixed:g32"))
    if not mixed < low:
        raise WrongError(f"the mix has a KL of {mixed:.2g} nats, INT4 alone {low:.2g}")
    return f"KL {mixed:.2g}, INT4 alone {low:.2g} nats"


def _quantized(bench: Bench, method: str) -> float:
    variant = bench.variant(method)
    every, unquantized = set(weights_of(bench.model)), {weight.name for weight in variant.kept}
    small = {weight.name for weight in variant.kept if weight.reason == FLOAT_REASONS["small"]}
    left = every - unquantized - set(variant.weights) - {bench.description.head}
    if left or set(variant.weights) | small != set(quantizable(bench.description)):
        raise WrongError(f"{method}: weights that are neither quantized nor kept for a reason: {sorted(left)}")
    if not (kl := bench.kl(variant)) > 0:
        raise WrongError(f"{method} changes nothing")
    return kl


@torch.inference_mode()
def _folding(bench: Bench) -> str:
    """Scale every group by random numbers and round nothing: the model must be what it was."""
    weights = weights_of(bench.model)
    scales = {group.names[0]: _scaled(group, seed) for seed, group in enumerate(_scalable(bench.description.groups))}
    after = _scaled_states(bench, weights, scales)
    return _near(after, bench.states, EXACT_NATS, "AWQ's scales alone change the states")


def _scaled_states(bench: Bench, weights: Mapping[str, Tensor], scales: Scales) -> Tensor:
    grids = dict.fromkeys(quantizable(bench.description), parse("int4-g32"))
    divisors = row_divisors(scales, weights)
    values = folded_floats(scales, weights, grids)
    by_name = {name: scaled for scaled in scales.values() for name in scaled.names}
    for name in grids:
        matrix = weights[name] / divisors[name].unsqueeze(1) if name in divisors else weights[name]
        values[name] = matrix * by_name[name].choice.scales if name in by_name else matrix
    with ExitStack() as stack:
        stack.enter_context(replace_values(weights, values))
        for name, factors in explicit_scales(scales).items():
            for module in modules_of(bench.model, name):
                stack.enter_context(scaled_input(module, factors))
        with bench.backend.open(None) as session:
            return session.states([bench.request])[0]


def _scalable(groups: Sequence[Group]) -> Iterator[Group]:
    return (group for group in groups if group.fold is not None or group.is_explicit)


def _scaled(group: Group, seed: int) -> Scaled:
    fold: Fold | None = group.fold
    count = group.columns if fold is None else fold.rows
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 4 + 0.25
    choice = ScaleChoice(drawn if fold is None else fold.spread(drawn), 0.5, 0.0, 0.0)
    return Scaled(group.names, choice, fold, group.followers)


def _scoring(bench: Bench) -> str:
    """Check a variant's logits against transformers' own of a copy with replaced weights; and the way back."""
    variant, weights = bench.variant("rtn:g32"), weights_of(bench.model)
    before = {name: weight.clone() for name, weight in weights.items()}
    twin = copy.deepcopy(bench.model)
    others = weights_of(twin)
    with torch.inference_mode():
        for name, weight in variant.weights.items():
            others[name].copy_(weight.dequantize())
        expected = twin(torch.tensor([bench.request.tokens]), use_cache=False).logits[0].float()
        with bench.backend.open(variant) as session:
            found = session.logits(session.states([bench.request])[0])
    if not all(torch.equal(before[name], weight) for name, weight in weights.items()):
        raise WrongError("the baseline's weights are not back")
    return _near(found, expected, ALIKE, "its logits are not those of the same weights in transformers")


def _prefix(bench: Bench) -> str:
    """Check continuations of a prefix that ran once against whole sequences."""
    lines = []
    with bench.backend.open(None) as session:
        for length in _PREFIXES:
            prefix, rests = _tokens(length, seed=1), [_tokens(count, seed=count) for count in _RESTS]
            shared = session.states([Request(r, tuple(range(len(r)))) for r in rests], session.prefill(prefix))
            whole = [
                session.states([Request(prefix + rest, tuple(range(length, length + len(rest))))])[0] for rest in rests
            ]
            lines.append(
                _near(torch.cat(shared), torch.cat(whole), ALIKE, f"a prefix of {length} tokens changes states")
            )
    return max(lines, key=float)


@torch.inference_mode()
def _cache(bench: Bench) -> str:
    """Check logits out of final hidden states that were kept against the model's own."""
    expected = bench.model(torch.tensor([bench.request.tokens]), use_cache=False).logits[0].float()
    return _near(bench.head.logits(bench.states), expected, ALIKE, "kept states give other logits")


def _onnx(bench: Bench) -> str:
    """Check the float graph and INT4 in it, on ONNX Runtime's CPU kernels, against torch."""
    try:
        require_builder()
        require_dynamo()
    except UsageError as error:
        raise InapplicableError(str(error)) from error
    from qeval.backends.onnx.export import OnnxExporter  # noqa: PLC0415 - an extra
    from qeval.backends.onnx.insert_weights import Style  # noqa: PLC0415

    with TemporaryDirectory(prefix="qeval-family-") as temporary:
        exported = Bench(bench.name, tiny_family(bench.name, **_SPECIAL))
        checkpoint, out = Path(temporary) / "model", Path(temporary) / "onnx"
        with quiet():
            exported.model.save_pretrained(checkpoint)
            byte_tokenizer().save_pretrained(checkpoint)
        names = [*quantizable(exported.description), exported.description.head]
        loaded = load_model(resolve(str(checkpoint)))
        try:
            exporter = OnnxExporter(loaded, names, "auto", torch.get_num_threads())
        except UsageError as error:  # it has experts
            raise InapplicableError(str(error)) from error
        variant = exported.variant("rtn:g32")
        exporter.write(variant, Style(), out)
        with exported.backend.open(variant) as session:
            kl = exporter.parity(out, session).kl_nats
    if not kl <= SAME_GRAPH:
        raise WrongError(f"KL from torch is {kl:.2g} nats")
    return f"{exporter.route}, KL {kl:.0e} nats"


CHECKS: Mapping[str, FamilyCheck] = {
    "rtn": _quantizer("rtn"),
    "awq": _quantizer("awq"),
    "gptq": _quantizer("gptq"),
    "mixed": _mixed,
    "folding": _folding,
    "scoring": _scoring,
    "prefix": _prefix,
    "states": _cache,
    "onnx": _onnx,
}
"""What is checked of each family, in the order of the matrix."""


def check_families(names: Sequence[str], progress: Progress, checks: Sequence[str] = tuple(CHECKS)) -> FamilyMatrix:
    """Run `checks` on the families of these names.

    Raises:
        UsageError: a name is not in the table.
    """
    for name in names:
        if name not in FAMILIES:
            raise unknown("family", name, FAMILIES)
    found: dict[str, dict[str, CheckCell]] = {}
    with progress.phase("check families", len(names) * len(checks)) as advance:
        for name in names:
            found[name] = {}
            for check, cell in _cells(name, checks):
                found[name][check] = cell
                advance(1)
    return found


def matrix_markdown(matrix: FamilyMatrix) -> list[str]:
    """Return the matrix as the lines of a table, each family a row, then why a cell is not a yes."""
    checks = list(next(iter(matrix.values())))
    rows = [["family", *checks], ["---", *[":-:"] * len(checks)]]
    rows += [[name, *(_word(check, cells[check]) for check in checks)] for name, cells in matrix.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    wanting = ((name, check, cell) for name, cells in matrix.items() for check, cell in cells.items())
    return [*lines, "", *(f"{n}, {check}: {cell.line}" for n, check, cell in wanting if cell.status != "works")]


def any_failed(matrix: FamilyMatrix) -> bool:
    """Return whether something that should work does not."""
    return any(cell.status == "fails" for cells in matrix.values() for cell in cells.values())


def _word(check: str, cell: CheckCell) -> str:
    if cell.status == "works":
        return cell.line.partition(",")[0] if check == "onnx" else "yes"
    return {"fails": "NO", "cannot": "-"}[cell.status]


def _cells(name: str, checks: Sequence[str]) -> Iterator[tuple[str, CheckCell]]:
    bench: Bench | None = None
    for check in checks:
        try:
            bench = bench or Bench(name)
            yield check, CheckCell("works", CHECKS[check](bench))
        except InapplicableError as error:
            yield check, CheckCell("cannot", str(error))
        except Exception as error:  # noqa: BLE001 - one family's failure is its cell's, whatever it is
            yield check, CheckCell("fails", str(error) or type(error).__name__)


def _tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def _near(found: Tensor, expected: Tensor, most: float, wrong: str) -> str:
    """Return the largest difference as a share of the largest value.

    Raises:
        QevalError: it is more than `most`.
    """
    apart = float((found - expected).abs().max() / expected.abs().max())
    if not apart <= most:
        raise WrongError(f"{wrong}: by {apart:.1e} of the largest, where {most:g} is allowed")
    return f"{apart:.0e}"
