"""The node that makes a quantised file from a BF16 one."""

import collections
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from .. import remap
from ..core import ProgressBar, get_torch_device, throw_exception_if_processing_interrupted
from ..files.text import shown
from ..fp8.cook import Options, cook, cooking_device
from ..fp8.files import open_files, state_if_there
from ..fp8.recipe import CONVS, RECIPES
from ..worldstereo.config import CONFIG_FILE, config_to_embed
from .common import CATEGORY, show_on_node
from .files import cook_sources, file_name
from .limits import checked

CONVS_OF_RECIPE = "as the recipe"

_made: dict[Path, tuple | None] = {}  # the `file_state` of each result since ComfyUI started
_lost: dict[Path, int] = collections.defaultdict(int)  # how often a result was found missing or replaced


class CookFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CookFP8",
            display_name="Cook FP8",
            category=CATEGORY,
            description="Makes the 20 GB FP8 or INT8 file of a WorldStereo BF16 model (35 GB), with less than 2 GB of "
            "memory, and reports the quantisation error. The file gets its name only when it is complete.",
            search_aliases=["quantize", "convert", "fp8", "int8", "convrot", "worldstereo"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=cook_sources(),
                    tooltip="A BF16, FP16 or FP32 WorldStereo model (with the recipe int8 also FP8) in "
                    "models/diffusion_models, or the .safetensors.index.json of one in shards.",
                ),
                io.String.Input(
                    "result",
                    default="worldstereo_fp8_scaled",
                    tooltip="The name of the new file, without a folder. It is written beside the source.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default=RECIPES[0],
                    tooltip="default: the scale is rounded before the division, so the error is smaller; loads "
                    "wherever published files load. published: bit for bit like the published files. int8: INT8 with "
                    "rotation (ConvRot), with a third of FP8's error, for cards with INT8 units (GeForce RTX 20 and "
                    "newer); made from an FP8 file it loses two thirds of that gain.",
                ),
                io.Combo.Input(
                    "convs",
                    options=[CONVS_OF_RECIPE, *CONVS.values()],
                    default=CONVS_OF_RECIPE,
                    advanced=True,
                    tooltip="The format of the two convolution weights of the mask embedding. The recipes "
                    "default and int8 leave them in BF16, published converts them to FP8.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace an existing file of that name."),
            ],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="picture")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source, result, **_):
        """Changes with the source and the config.json beside it, and if the result of an earlier run has been deleted
        or changed."""
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", source))
        made = path.with_name(file_name(result, ".safetensors"))
        if made in _made and state_if_there(made) != _made[made]:
            del _made[made]
            _lost[made] += 1
        return [*open_files(path).states, state_if_there(path.with_name(CONFIG_FILE)), _lost[made]]

    @checked
    def execute(cls, source, result, recipe, convs, overwrite) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", source))
        bar = ProgressBar(100)

        def on_progress(progress):
            throw_exception_if_processing_interrupted()
            percent = 100 * progress.nbytes // progress.total_nbytes
            if percent > bar.current:
                bar.update_absolute(percent)
                show_on_node(cls, str(progress))

        made = path.with_name(file_name(result, ".safetensors"))
        report = cook(
            path,
            made,
            Options(recipe, None if convs == CONVS_OF_RECIPE else convs),
            overwrite=overwrite,
            find_config=config_to_embed,
            refusal=remap.source_refusal,
            device=cooking_device(get_torch_device()),
            on_progress=on_progress,
        )
        _made[made] = state_if_there(made)
        name = shown(Path(source).with_name(made.name).as_posix())
        show_on_node(cls, f"Done: {name} in models/diffusion_models.\nPress R, then choose it in Load WorldStereo FP8.")
        picture = torch.from_numpy(np.array(report.picture(), dtype=np.float32) / 255)[None]
        return io.NodeOutput(report.as_text(), picture)


NODES = [CookFP8]
