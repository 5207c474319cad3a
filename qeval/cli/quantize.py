"""`qeval quantize`: one variant of a model, on disk."""

from qeval.api import making
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.recipe_choice import RecipeChoice
from qeval.compare.settings import Settings


@with_flags_of(making.quantize, trees=(Settings, RecipeChoice, HubChoice), method="One method; see `qeval methods`.")
def quantize(call: CommandCall) -> None:
    """Quantize a model one way and write the variant: packed integers, scales, zero points, manifest."""
    console = stderr()
    name, folder, manifest = making.quantize(**call.values, progress=ConsoleProgress(console, quiet=call.quiet))
    if call.as_json:
        print_json(manifest.model_dump_json(indent=1))
    elif not call.quiet:
        console.print(
            f"{name}: {len(manifest.weights)} matrices quantized, {len(manifest.kept)} weights kept in float, "
            f"{manifest.bits_per_weight:.3f} bits per weight, {manifest.size_bytes / 1e6:.1f} MB in {folder}",
            soft_wrap=True,
        )
