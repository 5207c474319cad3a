"""A variant: a model's quantized matrices, the floats that its method changed, and an account of every weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from qeval.quant.grid import FLOAT
from qeval.quant.qweight import QWeight
from qeval.quant.scheme import Scheme, TensorFormat

LEFT_IN_FLOAT = "the recipe leaves the weights in float"
"""The reason of a linear in a variant that rounds activations, keys or values alone."""


@dataclass(frozen=True)
class FloatWeight:
    """A weight that stays in float, with the reason."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix among a variant's floats that is quantized in the form that another tool stores it in.

    `form` names what no `Grid` says (`nf4, blocks of 64`, `Q4_K`); `size_bits` is what it takes there, scales included.
    """

    name: str
    parameters: int
    form: str
    size_bits: int


@dataclass(frozen=True)
class Choice:
    """The bits that a mix chose for one group of linears, and the KLs that it rests on, in nats.

    A mix of formats names the one that it chose (`float`: the group stays as it is), and has a KL for every grid that
    was measured; `kl_low` and `kl_high` are then those of the smallest and the largest grid. A mix of two widths has
    neither.
    """

    layer: int
    kind: str
    names: tuple[str, ...]
    parameters: int
    kl_low: float | None
    kl_high: float | None
    bits: int
    format: str | None = None
    kls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Variant:
    """A quantized model.

    `weights`: by parameter name. `floats`: tensors that replace the model's own (AWQ folds its scales into norms).
    `input_scales`: linears (by parameter name) whose input is multiplied by a vector [columns] before the matrix
    product. `kept`: every other weight, with its reason. `details`: what the method decided, in words. `stored`: which
    of the floats are a quantized matrix's values. `scheme`: how inputs of quantized linears, keys and values are
    rounded; `ranges`: the largest magnitudes that its static scales come from, by the linear's parameter name, or by
    the layer's number with `.keys` or `.values`. `input_formats`: the linears whose inputs are rounded otherwise than
    the scheme says; None leaves them as they are. `input_rotations`: linears whose input is turned while running,
    before scales and rounding: the core [m, m] that `rotation.turn_runs` takes with the columns as one run.
    `expert_tokens`: the calibration tokens that reached each expert, by the stack of their inner matrices.
    """

    key: str
    weights: Mapping[str, QWeight]
    floats: Mapping[str, Tensor]
    input_scales: Mapping[str, Tensor]
    kept: tuple[FloatWeight, ...]
    choices: tuple[Choice, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[StoredMatrix, ...] = ()
    scheme: Scheme = field(default_factory=Scheme)
    ranges: Mapping[str, Tensor] = field(default_factory=dict)
    input_rotations: Mapping[str, Tensor] = field(default_factory=dict)
    input_formats: Mapping[str, TensorFormat | None] = field(default_factory=dict)
    expert_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights_alone(self) -> "Variant":
        """The same weights with nothing rounded beside them."""
        return replace(self, scheme=Scheme(), ranges={}, input_formats={})

    @property
    def rounded_inputs(self) -> dict[str, TensorFormat]:
        """The formats of the quantized matrices' inputs by the matrix; of the head's too, which is not rounded."""
        return formats_of_inputs(self.activation_inputs, self.scheme, self.input_formats)

    @property
    def quantized_matrices(self) -> tuple[str, ...]:
        """The names of the matrices on a grid, or quantized in a form of their own."""
        return (*self.weights, *(each.name for each in self.stored))

    @property
    def activation_inputs(self) -> tuple[str, ...]:
        """The names of the linears whose inputs the scheme's activations are: the quantized ones, or all in float."""
        return (*self.quantized_matrices, *left_in_float(self.kept))

    @property
    def quantized_parameters(self) -> int:
        """The number of weights on a grid, or quantized in a form of their own."""
        on_grids = sum(weight.codes.numel() for weight in self.weights.values())
        return on_grids + sum(each.parameters for each in self.stored)

    @property
    def quantized_bits(self) -> int:
        """Bits of the quantized matrices on disk: codes, scales, zero points, input scales in fp32; else as stored."""
        scales = sum(vector.numel() * 32 for vector in self.input_scales.values())
        stored = sum(each.size_bits for each in self.stored)
        return scales + stored + sum(weight.size_bits for weight in self.weights.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits a quantized weight, scales and zero points counted.

        What stays in float is not, save the groups that a mix chose to leave there: they count in full.
        """
        in_float = [choice for choice in self.choices if choice.format == FLOAT]
        bits = self.quantized_bits + sum(choice.parameters * choice.bits for choice in in_float)
        return bits / (self.quantized_parameters + sum(choice.parameters for choice in in_float))

    def size_bytes(self, float_bits: int) -> int:
        """Bytes of all weights, those kept in float at `float_bits` each."""
        return (self.quantized_bits + sum(kept.parameters for kept in self.kept) * float_bits) // 8

    def bits_per_weight_model(self, float_bits: int) -> float:
        """Bits a parameter over the whole model, head and embedding included."""
        parameters = self.quantized_parameters + sum(kept.parameters for kept in self.kept)
        return self.size_bytes(float_bits) * 8 / parameters


def left_in_float(kept: Iterable[FloatWeight]) -> list[str]:
    """Return the linears that a recipe leaves in float while it rounds their inputs."""
    return [each.name for each in kept if each.reason == LEFT_IN_FLOAT]


def formats_of_inputs(
    names: Iterable[str], scheme: Scheme, others: Mapping[str, TensorFormat | None]
) -> dict[str, TensorFormat]:
    """Return the formats that linears' inputs are rounded to, by the linear.

    Args:
        names: The linears whose inputs the scheme's activations are.
        scheme: The variant's.
        others: The linears for which it does not hold; None leaves them as they are.
    """
    formats = dict.fromkeys(names, scheme.activations) | dict(others)
    return {name: how for name, how in formats.items() if how is not None}
