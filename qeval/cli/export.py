"""`qeval export`: one variant of a model in the files that runtimes load."""

from qeval.api import making
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.options import Option
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import ExportChoice, Settings


@with_flags_of(
    making.export,
    trees=(Settings, RecipeChoice, HubChoice, ExportChoice),
    method="One method (see `qeval methods`), or `float`.",
    accuracy_level=Option("1: fp32 activations; 4: int8 activations, faster and less exact.", type=int),
)
def export(call: CommandCall) -> None:
    """Quantize a model one way and write it as an ONNX folder, a checkpoint for vLLM or a GGUF file."""
    console = stderr()
    folder, manifest = making.export(**call.values, progress=ConsoleProgress(console, quiet=call.quiet))
    if call.as_json:
        print_json(manifest.model_dump_json(indent=1))
        return
    if call.quiet:
        return
    for sentence in manifest.describe():
        console.print(sentence, soft_wrap=True)
    console.print(f"written: {folder}", soft_wrap=True)
