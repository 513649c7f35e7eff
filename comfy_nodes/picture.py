"""The picture and its caption, as the model was trained to see them."""

from comfy_api.latest import io, ui

from ..scene.fit import FITS, fit_pictures, lay_on
from ..worldstereo.comfy_model import TEXT_TOKENS, config_of
from ..worldstereo.conditioning import keyframe_size
from ..worldstereo.config import WorldStereoConfig
from ..worldstereo.prompt import encode_caption
from .common import CATEGORY, color_of, show_on_node
from .limits import checked


class WorldStereoPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPicture",
            display_name="WorldStereo Picture",
            category=CATEGORY,
            description="Resizes the picture to the model's size once, for all nodes after it: MoGe, CLIP Vision, "
            "Camera Path, Render and Conditioning. The size is the one in the model's table with the nearest shape.",
            search_aliases=["resize", "crop", "pad", "scale image", "worldstereo size"],
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From Load WorldStereo FP8: its settings give the sizes. Without it they are those of the "
                    "published models, and the nodes after this one need not wait for the model to load.",
                ),
                io.Image.Input("image", tooltip="The picture. Several pictures are all treated the same way."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    tooltip="crop: cuts off what is too wide or too high; the node shows it. pad: adds borders. "
                    "stretch: changes the shape, as WorldStereo's own code does; for a render, mask and cameras made "
                    "for the whole picture.",
                ),
                io.Float.Input(
                    "position",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Which part crop keeps, and where pad puts the picture: 0 left or top, 0.5 the middle, 1 "
                    "right or bottom.",
                ),
                io.Color.Input(
                    "background",
                    default="#808080",
                    advanced=True,
                    tooltip="Colour behind transparent parts, and of the borders that pad adds.",
                ),
                io.Mask.Input(
                    "transparency",
                    optional=True,
                    tooltip="Load Image's mask: 1 where the picture is transparent. Not needed for pictures with a "
                    "fourth channel.",
                ),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="At the model's size.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, image, fit, position, background, model=None, transparency=None) -> io.NodeOutput:
        height, width = keyframe_size(config_of(model) if model else WorldStereoConfig(), *image.shape[1:3])
        image, transparent = lay_on(image, transparency, color_of(background))
        picture, preview, line = fit_pictures(image, height, width, fit, position, color_of(background))
        show_on_node(cls, line + (f"\ntransparent parts laid on {background}" if transparent else ""))
        return io.NodeOutput(picture, ui=ui.PreviewImage(preview, cls=cls))


class WorldStereoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoPrompt",
            display_name="WorldStereo Prompt",
            category=CATEGORY,
            description="Encodes a caption in the form WorldStereo was trained on: cleaned plain text, in which "
            f"parentheses are not weights, cut at {TEXT_TOKENS} tokens.",
            search_aliases=["caption", "clip text encode", "text", "prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="UMT5-XXL: Load CLIP with the type wan."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="What the scene shows and how it looks. HTML entities (&amp;), repeated spaces, curly "
                    "quotes and wrongly decoded letters are cleaned up.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(cls, clip, text) -> io.NodeOutput:
        conditioning, count, remarks = encode_caption(clip, text)
        show_on_node(cls, f"{min(count, TEXT_TOKENS)} of {TEXT_TOKENS} tokens", remarks)
        return io.NodeOutput(conditioning)


NODES = [WorldStereoPicture, WorldStereoPrompt]
