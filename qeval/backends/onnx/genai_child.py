"""The model builder of onnxruntime-genai in a process of its own: `genai_child CHECKPOINT OUT EP PRECISION`.

A float model goes in and comes out in fp32 or fp16, nothing fused that a recipe may want apart. Four habits of
builder 0.18 would make the graph another model than the checkpoint, or none; they are set right here, and the result
is compared with torch by whoever called:

- Gemma's embedding scale is rounded to two decimals;
- Gemma 3's rotary parameters are looked up where transformers 4 kept them (a KeyError with 5);
- LongRoPE's kind is looked up under its old name, `type` (likewise);
- sliding layers take keys and values of a fixed capacity, where plain ones are wanted.
"""

import sys
from math import sqrt
from typing import Any

import onnxruntime_genai.models  # noqa: F401 - puts the builder's modules on sys.path

import builder  # isort: skip
from builders import gemma, phi  # isort: skip

OPTIONS = ("fuse_qkv=false", "windowed_kv_cache=false", "hf_remote=false")


def main() -> None:
    """Build the graph of the folder argv[1] in the folder argv[2] for the builder's provider argv[3]."""
    source, out, ep, precision = sys.argv[1:5]
    mend()
    extra = builder.parse_extra_options(None, source, out, precision, ep, f"{out}/cache", list(OPTIONS))
    builder.create_model(None, source, out, precision, ep, f"{out}/cache", **extra)


def mend() -> None:
    """Set the builder's habits right, in this process."""
    _mend_gemma()
    _mend_long_rope()


def _mend_gemma() -> None:
    for model in (gemma.GemmaModel, gemma.Gemma2Model, gemma.Gemma3Model):
        model.__init__ = _mended(model.__init__)


def _mended(init: Any) -> Any:
    def wrapped(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        rope = getattr(config, "rope_parameters", None) or {}
        if "full_attention" in rope:
            config.rope_theta = rope["full_attention"]["rope_theta"]
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            config.rope_parameters = dict(rope["full_attention"])
        init(self, config, *arguments, **named)
        self.embed_attrs["scale"] = sqrt(self.hidden_size)

    return wrapped


def _mend_long_rope() -> None:
    for model in (phi.Phi3MiniLongRoPEModel, phi.Phi3MoELongRoPEModel):
        model.make_rope_init = _typed(model.make_rope_init)


def _typed(make_rope_init: Any) -> Any:
    def wrapped(self: Any, config: Any) -> None:
        config.rope_parameters.setdefault("type", config.rope_parameters["rope_type"])
        make_rope_init(self, config)

    return wrapped


if __name__ == "__main__":
    main()
