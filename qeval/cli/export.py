"""`qeval export`: one variant of a model as an ONNX folder."""

from qeval.api import making
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.options import Option
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import Settings


@with_flags_of(
    making.export,
    trees=(Settings, RecipeChoice, HubChoice),
    method="One method (see `qeval methods`), or `float`.",
    accuracy_level=Option("1: fp32 activations; 4: int8 activations, faster and less exact.", type=int),
)
def export(call: CommandCall) -> None:
    """Quantize a model one way and write it as an ONNX folder that onnxruntime-genai loads."""
    console = stderr()
    folder, manifest = making.export(**call.values, progress=ConsoleProgress(console, quiet=call.quiet))
    if call.as_json:
        print_json(manifest.model_dump_json(indent=1))
        return
    if call.quiet:
        return
    for sentence in manifest.contents:
        console.print(sentence, soft_wrap=True)
    if manifest.parity:
        console.print(
            f"Against the same weights in torch: mean KL {manifest.parity['kl_nats']:.1e} nats, largest logit "
            f"difference {manifest.parity['max_logit_difference']:.1e} over {manifest.parity['tokens']:.0f} tokens.",
            soft_wrap=True,
        )
    else:
        console.print(f"Not compared with torch: {manifest.parity_missing}", soft_wrap=True)
    console.print(f"written: {folder}", soft_wrap=True)
