"""Numbers in words: as many digits as their interval supports, a true minus sign, sizes in powers of ten."""

from math import floor, log10

from qeval.report.model import Metric
from qeval.store.run import ProtocolRecord

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
_PERPLEXITY_DIGITS = 4  # variants often differ from the fourth digit on
_MOST_DECIMALS = 6
_LARGEST_PLAIN = 1e7
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_LETTERS = 26
_CATEGORIES = {
    "stem": "STEM",
    "humanities": "Humanities",
    "social_sciences": "Social sciences",
    "other": "Other",
}


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """Return a number with so many decimals; in powers of ten where they would show nothing of it.

    >>> number(-0.25, 1), number(3, 0, signed=True)
    ('−0.2', '+3')
    """
    text = f"{abs(value):.{decimals}f}"
    if decimals == _MOST_DECIMALS and 0 < abs(value) < 10.0**-_MOST_DECIMALS:
        text = f"{abs(value):.1e}"
    if abs(value) >= _LARGEST_PLAIN:
        text = f"{abs(value):.3g}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def decimals_for(value: float, low: float | None, high: float | None, significant: int = 3) -> int:
    """Return how many decimals: two digits of the interval's half-width, and at least so many digits of the value.

    >>> decimals_for(0.1148, 0.1013, 0.1288), decimals_for(12.3456, None, None, 4)
    (3, 2)
    """
    width = (high - low) / 2 if low is not None and high is not None else 0.0
    of_width = 1 - floor(log10(width)) if width > 0 else 0
    of_value = significant - 1 - floor(log10(abs(value))) if value else 0
    if width > abs(value) > 0:
        of_value = of_width  # a difference lost in its interval has no digits of its own
    return _clamp(max(of_width, of_value))


def value_text(metric: Metric, *, signed: bool = False) -> str:
    """Return the value alone, with its unit where the unit belongs to the number (per cent, points, factor)."""
    if metric.value is None:
        return f"not finite ({metric.non_finite} of {metric.n})" if metric.non_finite else MISSING
    scale, suffix = _scale(metric, signed)
    return number(metric.value * scale, _decimals(metric, scale), signed=signed) + suffix


def interval_text(metric: Metric, *, signed: bool = False) -> str | None:
    """Return the interval in brackets, without the unit; None where there is none."""
    if metric.value is None or metric.low is None or metric.high is None:
        return None
    scale, _ = _scale(metric, signed)
    decimals = _decimals(metric, scale)
    ends = (number(end * scale, decimals, signed=signed) for end in (metric.low, metric.high))
    return f"[{', '.join(ends)}]"


def metric_text(metric: Metric, *, signed: bool = False) -> str:
    """Return the value with its interval: `0.115 [0.101, 0.129]`."""
    interval = interval_text(metric, signed=signed)
    return value_text(metric, signed=signed) + (f" {interval}" if interval else "")


def size(size_bytes: float | None) -> str:
    """Return a size in powers of ten; a dash where it is not known.

    >>> size(269_030_000), size(1_812_000_000)
    ('269 MB', '1.81 GB')
    """
    if size_bytes is None:
        return MISSING
    for unit, factor in _UNITS:
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def bits(bits_per_weight: float | None) -> str:
    """Return bits per weight; a dash where they are not known.

    >>> bits(4.128), bits(None)
    ('4.13', '–')
    """
    return MISSING if bits_per_weight is None else f"{bits_per_weight:.2f}"


def count(number: int | None) -> str:
    """Return a large count as a reader says it; a dash where it is not known.

    >>> count(134_515_008), count(1_235_814_400), count(960)
    ('135 M', '1.24 B', '960')
    """
    if number is None:
        return MISSING
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:,}"


def percent(share: float | None, decimals: int = 0) -> str:
    """Return a share in per cent; a dash where it is not known.

    >>> percent(0.457)
    '46 %'
    """
    return MISSING if share is None else f"{number(100 * share, decimals)} %"


def duration(seconds: float | None) -> str:
    """Return a time a reader can picture; a dash where it is not known.

    >>> duration(501.2), duration(12.51), duration(7260)
    ('8 min 21 s', '12.5 s', '2 h 1 min')
    """
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def category(name: str) -> str:
    """Return a category as a reader writes it."""
    return _CATEGORIES.get(name, name.replace("_", " ").capitalize())


def subject(name: str) -> str:
    """Return a subject as a reader writes it.

    >>> subject("high_school_us_history")
    'High school US history'
    """
    return name.replace("_", " ").capitalize().replace(" us ", " US ").replace("Us ", "US ")


def spans(values: list[int]) -> str:
    """Return ascending whole numbers with their runs drawn together.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}\N{EN DASH}{run[-1]}" for run in runs)


def letter(choice: int) -> str:
    """Return a choice, counted from 0, as a reader calls it.

    >>> letter(2), letter(30)
    ('C', '31')
    """
    return chr(ord("A") + choice) if choice < _LETTERS else str(choice + 1)


_BOS = {
    "text": "once, in front of the text",
    "window": "in front of each window",
    "replace": "in place of each window's first token",
    "document": "in front of each page",
    None: "in front of each window",
}


def bos(protocol: ProtocolRecord) -> str:
    """Return where BOS stands, by which policy."""
    policy = f" (--bos {protocol.bos_policy})" if protocol.bos_policy else ""
    if not protocol.bos:
        return f"no BOS{policy}"
    return f"{protocol.bos_token or 'BOS'} {_BOS[protocol.bos_placement]}{policy}"


def runtime(version: str) -> str:
    """Return the name of what ran a model, by what a record says.

    >>> runtime("llama-cpp-python 0.3.36"), runtime("vllm 0.32.0"), runtime("onnxruntime-gpu 1.31.1")
    ('llama.cpp', 'vLLM', 'ONNX Runtime')
    """
    return {"llama-cpp-python": "llama.cpp", "vllm": "vLLM"}.get(version.partition(" ")[0], "ONNX Runtime")


def listed(names: list[str]) -> str:
    """Return names as a sentence lists them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _clamp(decimals: int) -> int:
    return min(max(decimals, 0), _MOST_DECIMALS)


def _scale(metric: Metric, signed: bool) -> tuple[float, str]:
    if metric.unit == "fraction":
        return 100.0, " pts" if signed else " %"
    return 1.0, ""


def _decimals(metric: Metric, scale: float) -> int:
    low, high = (None if end is None else end * scale for end in (metric.low, metric.high))
    value = 0.0 if metric.value is None else metric.value * scale
    if metric.unit == "fraction":
        return min(max(decimals_for(value, low, high, 0), 1), 3)
    return decimals_for(value, low, high, _PERPLEXITY_DIGITS if metric.unit == "ppl" else 3)
