"""From a checkpoint to ONNX folders: the float graph once, compared with torch, then a variant's integers put into it.

Route A is the model builder of onnxruntime-genai, whose folders its runtime loads and generates from; route B is
torch's own exporter, for families that the builder doesn't take.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx_ir as ir
import torch

from qeval.backends.onnx import dynamo
from qeval.backends.onnx.expert_nodes import QUANTIZED_EXPERTS, activation_of, expert_modules
from qeval.backends.onnx.files import CONFIG, GENAI_CONFIG
from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.insert_cache import quantize_caches
from qeval.backends.onnx.insert_experts import MatrixCounts, quantized_experts
from qeval.backends.onnx.insert_inputs import MATMUL_INTEGER
from qeval.backends.onnx.insert_weights import NBITS, Style, apply, make_exact
from qeval.backends.onnx.match_parameters import locate, read_places
from qeval.backends.onnx.packages import require_builder, require_dynamo
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.settings import QDQ_LEVEL
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, UsageError
from qeval.files.atomic import atomic_folder, write_text
from qeval.identity import digest, digest_file
from qeval.metrics.tokens import near_kl
from qeval.models.checkpoint.cache import build_once
from qeval.models.info import LoadedModel
from qeval.models.load import load_model
from qeval.models.source import resolve
from qeval.models.structure.weight_views import is_expert, stacks_of, weights_of
from qeval.models.trust import NO_HUB, clean_copy, known_files
from qeval.paths import home
from qeval.progress import Progress
from qeval.quant.variant import Variant
from qeval.types import OnnxPrecision, Request

EXPORT_VERSION = 1
"""Raise it when the same checkpoint gives another float graph."""

Route = Literal["genai", "dynamo"]
MODEL = "model.onnx"
_DATA = "model.onnx.data"
_PLACES = "places.json"
_MOST_KL: Mapping[OnnxPrecision, float] = {"fp32": 1e-8, "fp16": 1e-3}
_BUILDER_EPS = {"cuda": "cuda", "tensorrt": "cuda", "trt-rtx": "NvTensorRtRtx", "dml": "dml", "webgpu": "webgpu"}
"""The builder's names of providers; the others run the graphs that it makes for the CPU."""

_REFUSED_SECONDS = 24 * 3600
"""How long a builder's refusal is believed: it may have been the machine's fault."""
_PROBE = 128
_TEXT = (
    "A quantized model answers almost as its original does, and the question is always how much 'almost' is. "
    "In 1854 the engineers of the railway measured 3,217 rails twice, with two instruments, before they trusted one."
)


@dataclass(frozen=True)
class ExportTarget:
    """The execution provider that a graph is made for, and the type of its activations and floats."""

    ep: str = "cpu"
    precision: OnnxPrecision = "fp32"


@dataclass(frozen=True)
class Parity:
    """An exported graph against torch on the same tokens: mean KL in nats, largest difference of a logit."""

    tokens: int
    kl_nats: float
    max_logit_difference: float


class OnnxExporter:
    """Makes ONNX folders of one loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        names: Iterable[str],
        exporter: str,
        threads: int,
        target: ExportTarget = ExportTarget(),
    ) -> None:
        """`names` are the parameters that quantizers touch, the head's included; `exporter` is auto, genai or dynamo.

        Raises:
            UsageError: what the exporter needs is not installed, or it can't make graphs for the target.
        """
        if exporter == "dynamo" and target.precision != "fp32":
            raise UsageError("--exporter dynamo writes fp32 graphs only; take --exporter genai, or --precision fp32.")
        self.target = target
        if exporter == "dynamo":
            require_dynamo()
        self._builder = None if exporter == "dynamo" else require_builder().genai_version
        self._loaded, self.asked, self._threads = loaded, exporter, threads
        if stacks_of(loaded.model):
            self.asked = _exporter_of_experts(loaded, exporter, target)
        self._names = tuple(names)
        head = loaded.model.get_output_embeddings()
        self._head = next(f"{name}.weight" for name, module in loaded.model.named_modules() if module is head)
        self.route: Route | None = None
        """The route that made the float graph; None before it is made."""
        self.refused: str | None = None
        """Why the builder did not take the model, where `auto` went on to torch's exporter."""
        self._failure: str | None = None
        self._is_prepared = False

    @property
    def weights_sha256(self) -> str:
        """The identity of the checkpoint."""
        return self._loaded.info.weights_sha256

    def prepare(self, progress: Progress) -> str | None:
        """Make the float graph, if this was not tried before, and say how; return why it can't be made, if it can't."""
        if self._is_prepared:
            return self._failure
        self._is_prepared = True
        with progress.phase("export the float graph", 1) as advance:
            try:
                self.float_folder()
            except QevalError as error:
                self._failure = str(error)
                progress.warn(f"ONNX export failed: {error}")
                return self._failure
            advance(1)
        if self.refused:
            progress.warn(f"{self.refused} torch's own exporter made the graph instead.")
        return None

    def float_folder(self) -> Path:
        """Return the float graph in fp32, made and compared with torch once, then kept in the cache.

        Raises:
            QevalError: no route takes the model, or the graph's answers are not torch's.
        """
        if self.asked == "auto" and self.refused is None:
            try:
                return self._cached_folder("genai")
            except QevalError as error:
                if self.target.precision != "fp32":
                    raise
                self.refused = str(error)
                require_dynamo()
        return self._cached_folder("genai" if self.asked == "genai" else "dynamo")

    def write(
        self, variant: Variant | None, style: Style, out: Path, finish: Callable[[Path], None] | None = None
    ) -> None:
        """Write a variant's (or the float model's) folder to `out`, which must not exist; it appears whole.

        `finish` may add files to the folder before it appears.

        Raises:
            QevalError: the graph has no place for something of the variant, or can't be written.
            UsageError: the kernel takes no block of a grid's size.
        """
        source = self.float_folder()
        with atomic_folder(out) as part:
            if variant is None:
                without = shutil.ignore_patterns("qeval.json", _PLACES)
                shutil.copytree(source, part, ignore=without, dirs_exist_ok=True)
            else:
                _copy_others(source, part)
                model = ir.load(source / MODEL)
                places = read_places(model.graph, json.loads((source / _PLACES).read_text(encoding="utf-8")))
                meant = apply(model.graph, places, variant, style, self._head)
                quantize_caches(model.graph, variant, part)
                _save(model, part)
                _check_written(part, meant, style)
                if style.format == "qdq":
                    _ask_level(part, style.accuracy_level)
            if finish is not None:
                finish(part)
            if out.exists():  # its content is someone's, and would be replaced
                raise QevalError(f"Cannot write {out}: it exists.")

    def parity(self, folder: Path, session: TorchSession) -> Parity:
        """Compare a folder's answers on the CPU with a torch session's, over a short text."""
        ids = self._probe()
        request = Request(tuple(ids), tuple(range(len(ids))))
        with opened(folder, choose_provider("cpu"), threads=self._threads) as found, torch.inference_mode():
            theirs, ours = found.session.states([request])[0], session.states([request])[0]
            kl = near_kl(session.logits, ours, found.session.logits, theirs)
            worst = max(
                float((session.logits(ours[i : i + 16]).cpu() - found.session.logits(theirs[i : i + 16])).abs().max())
                for i in range(0, len(ids), 16)
            )
        return Parity(len(ids), float(kl.mean()), worst)

    def _cached_folder(self, route: Route) -> Path:
        self.route = route
        files = {path.name: digest_file(path) for path in known_files(self._loaded.folder)}
        made_from = {"weights": self.weights_sha256, "files": files}
        key = digest({"export": EXPORT_VERSION, "route": route, **made_from, **vars(self.target)})[:16]
        name = f"onnx-{route}-{key}"
        make = self._build if route == "dynamo" or self.asked != "auto" else partial(self._try, name)
        return build_once(name, (), partial(make, route))

    def _try(self, name: str, route: Route, folder: Path) -> None:
        """Build; where the builder does not take the model, why is kept for a day, so that no other process tries.

        Raises:
            QevalError: it doesn't, or didn't within the last day, with the same version of it.
        """
        note = home() / "onnx" / f"{name}-{self._builder}.refused"
        with suppress(OSError):
            if time.time() - note.stat().st_mtime < _REFUSED_SECONDS:
                raise QevalError(note.read_text(encoding="utf-8"))
        try:
            self._build(route, folder)
        except QevalError as error:
            write_text(note, str(error))
            raise

    def _build(self, route: Route, folder: Path) -> None:
        raw = folder / "raw"
        with TemporaryDirectory(prefix="qeval-clean-") as clean:
            checkpoint = clean_copy(self._loaded.folder, Path(clean))
            try:
                if route == "genai":
                    _run_builder(checkpoint, raw, self.target)
                else:
                    dynamo.export_dynamo(checkpoint, raw)
                    _copy_others(checkpoint, raw)
            except QevalError as error:
                raise QevalError(str(error).replace(str(checkpoint), str(self._loaded.folder))) from error
            _copy_others(raw, folder)
            shutil.copyfile(checkpoint / CONFIG, folder / CONFIG)
        model = ir.load(raw / MODEL)
        model.producer_version = (model.producer_version or "").partition("+")[0]  # the builder adds a git commit
        # The graph holds the checkpoint's exact values and is judged in fp32, whatever torch computes in here.
        reference = _in_fp32(self._loaded)
        parameters = {name: reference.get_parameter(name) for name in self._names if not is_expert(name)}
        parameters |= {name: tensor for name, tensor in weights_of(reference).items() if not is_expert(name)}
        places = locate(model.graph, parameters)
        make_exact(places, parameters)
        _save(model, folder)
        (folder / _PLACES).write_text(json.dumps(places.spelled()), encoding="utf-8")
        del model
        shutil.rmtree(raw)
        parity = self.parity(folder, TorchSession(reference))
        most = _MOST_KL[self.target.precision]
        if not parity.kl_nats <= most:
            raise QevalError(
                f"The {route} export of {self._loaded.info.architecture} is not the model: over {parity.tokens} tokens "
                f"its KL from torch is {parity.kl_nats:.2g} nats (largest logit difference "
                f"{parity.max_logit_difference:.2g}), where {most:g} is allowed; try the other --exporter."
            )

    def _probe(self) -> list[int]:
        ids: list[int] = self._loaded.tokenizer(_TEXT).input_ids
        window = getattr(self._loaded.model.config.get_text_config(), "sliding_window", None) or 0
        length = min(self._loaded.info.context_length, max(_PROBE, window + 64 if window <= 1024 else 0))
        return (ids * (1 + length // len(ids)))[:length]


def _exporter_of_experts(loaded: LoadedModel, exporter: str, target: ExportTarget) -> str:
    """Return the exporter for a model that has experts: torch's own.

    Raises:
        UsageError: another is asked for, or ONNX Runtime has no node for these experts.
    """
    model = loaded.info.architecture
    if exporter == "genai" or target.precision != "fp32":
        raise UsageError(
            f"{model} has experts, which onnxruntime-genai's model builder rounds itself; take --exporter dynamo and "
            "--precision fp32, or leave ONNX out (--backend torch)."
        )
    require_dynamo()
    modules = expert_modules(loaded.model)
    for name, experts in modules.items():
        activation_of(name, experts)
    unknown = [name for name in stacks_of(loaded.model) if name.rpartition(".")[0] not in modules]
    if unknown:
        raise UsageError(
            f"{model} has experts ({unknown[0]}) that are not called as transformers calls others, with the experts of "
            "each token and their weights: ONNX Runtime has no node for them; leave ONNX out (--backend torch)."
        )
    return "dynamo"


def _in_fp32(loaded: LoadedModel) -> Any:
    """Return the model in fp32: the loaded one where it is, else its checkpoint loaded again on the CPU.

    In bf16 torch differs from itself in fp32 by more than a right graph may differ from it.
    """
    if loaded.info.compute_dtype == "float32":
        return loaded.model
    return load_model(resolve(str(loaded.folder)), device="cpu", dtype="float32").model


def _run_builder(checkpoint: Path, out: Path, target: ExportTarget) -> None:
    """Run the model builder in a process of its own: its memory, its noise and its hub client stay there."""
    ep = _BUILDER_EPS.get(target.ep, "cpu")
    arguments = [str(checkpoint.resolve()), str(out.resolve()), ep, target.precision]
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("genai_child.py")), *arguments],
        cwd=out,
        env={**os.environ, **NO_HUB},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    shutil.rmtree(out / "cache", ignore_errors=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].rstrip(".") if lines else f"exit code {done.returncode}"
        raise QevalError(f"The model builder of onnxruntime-genai did not take '{checkpoint}': {reason}.")


def _copy_others(source: Path, out: Path) -> None:
    """Copy configuration and tokenizer by their names; a library or a script that lies beside them stays there."""
    out.mkdir(parents=True, exist_ok=True)
    genai = source / GENAI_CONFIG
    for path in (*known_files(source), *([genai] if genai.is_file() else [])):
        shutil.copyfile(path, out / path.name)


def _save(model: ir.Model, folder: Path) -> None:
    try:
        ir.save(model, folder / MODEL, external_data=_DATA)
    except OSError as error:
        raise QevalError(f"Cannot write {folder / MODEL}: {error.strerror or error}.") from error


def _check_written(folder: Path, meant: MatrixCounts, style: Style) -> None:
    """Read the attributes back: builders are known to drop options without a word, and so might we."""
    found: MatrixCounts = Counter()
    for node in ir.load(folder / MODEL).graph:
        attributes = {name: value.as_int() for name, value in node.attributes.items() if name in _READ_BACK}
        if style.format == "nbits" and node.op_type == NBITS:
            found[tuple(attributes[name] for name in ("N", "K", "bits", "block_size"))] += 1  # type: ignore[index]
            if attributes["accuracy_level"] != style.accuracy_level:
                raise QevalError(f"{folder}: {node.name} has another accuracy level than {style.accuracy_level}.")
        elif node.op_type == QUANTIZED_EXPERTS:
            found += quantized_experts(node)
        elif node.op_type == MATMUL_INTEGER:
            codes = node.inputs[1]
            assert codes is not None and codes.const_value is not None
            columns, rows = codes.const_value.shape.numpy()
            found[rows, columns, 8, 0] += 1
        elif style.format == "qdq" and node.op_type == "DequantizeLinear":
            codes = node.inputs[0]
            assert codes is not None and codes.const_value is not None
            columns, rows = codes.const_value.shape.numpy()
            found[rows, columns, codes.const_value.dtype.bitwidth, attributes["block_size"]] += 1
    if found != meant:
        raise QevalError(f"{folder} holds other quantized matrices than were meant: {found - meant or meant - found}.")


_READ_BACK = ("N", "K", "bits", "block_size", "accuracy_level")


def _ask_level(folder: Path, level: int) -> None:
    """Have a session fuse DequantizeLinear + MatMul at an accuracy level; ONNX Runtime's default is int8 activations.

    onnxruntime-genai reads it in its own configuration; in folders without one, `session_entries` finds it in ours.
    """
    file = folder / GENAI_CONFIG
    config = file if file.is_file() else folder / CONFIG
    content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    holder = content["model"]["decoder"] if config == file else content
    holder.setdefault("session_options", {})[QDQ_LEVEL] = str(level)
    config.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
