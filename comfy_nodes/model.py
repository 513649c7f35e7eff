"""Nodes that load a checkpoint and prepare what is sampled with it."""

import functools
from pathlib import Path

import folder_paths
import node_helpers
from comfy_api.latest import io

from ..fp8.files import state_if_there
from ..fp8.linear import COMPUTE
from ..loaders import load_worldstereo
from ..worldstereo.comfy_model import config_of
from ..worldstereo.conditioning import References, condition, keyframe_size, remarks
from ..worldstereo.config import CONFIG_FILE
from ..worldstereo.keyframe_vae import decode_keyframes, encode_keyframes
from ..worldstereo.schedule import dmd_sigmas
from .common import CATEGORY, Cameras, SceneReferences, show_on_node
from .files import diffusion_models
from .limits import checked

NO_BASE = "none"


class LoadWorldStereoFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadWorldStereoFP8",
            display_name="Load WorldStereo FP8",
            category=CATEGORY,
            description="Loads a WorldStereo checkpoint (camera, memory or memory-dmd; scaled FP8, INT8 or BF16, any "
            "naming) as an ordinary MODEL for ComfyUI's samplers, LoRA loaders and offloading.",
            search_aliases=["worldstereo", "fp8", "int8", "wan", "novel view", "world", "camera control", "3d photo"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=diffusion_models(),
                    tooltip="A WorldStereo .safetensors file in models/diffusion_models. An FP8 or INT8 "
                    "file takes 20 GB of disk, the BF16 source 35 GB.",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE),
                    default=COMPUTE[0],
                    tooltip="How quantised layers multiply. auto: as they are stored where the card can (FP8: GeForce "
                    "RTX 40, Hopper and newer; INT8: RTX 20 and newer), else the weight is upcast for each product. "
                    "fp8: as they are stored, else an error. bf16: always upcast.",
                ),
                io.Combo.Input(
                    "base_model",
                    options=[NO_BASE, *diffusion_models()],
                    default=NO_BASE,
                    optional=True,
                    advanced=True,
                    tooltip="Only for an overlay, a file that holds only a part of the backbone: the "
                    "Wan2.1-I2V-14B-480P model it was trained on.",
                ),
                io.Boolean.Input(
                    "prompt_cache",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Keeps what depends only on the prompt or the timestep: 0.6 GB per prompt, in "
                    "VRAM during a run; 8 GB of weights then need no VRAM. Off: "
                    "computed again at every step, with the same result.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(
                    display_name="negative_prompt",
                    tooltip="The negative prompt of the model's configuration, for the variants that are "
                    "sampled with cfg above 1; empty where the configuration has none.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, base_model=NO_BASE, **_):
        """Changes with the model's file, its base and the config.json beside it."""
        path, base = _paths(model_name, base_model)
        return [state_if_there(file) for file in (path, Path(path).with_name(CONFIG_FILE), base) if file is not None]

    @checked
    def execute(cls, model_name, compute, base_model=NO_BASE, prompt_cache=True) -> io.NodeOutput:
        path, base = _paths(model_name, base_model)
        model = load_worldstereo(path, compute, base=base, prompt_cache=prompt_cache)
        return io.NodeOutput(model, config_of(model).negative_prompt)


def _paths(model_name: str, base_model: str) -> tuple[str, str | None]:
    find = functools.partial(folder_paths.get_full_path_or_raise, "diffusion_models")
    return find(model_name), None if base_model == NO_BASE else find(base_model)


class WorldStereoConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoConditioning",
            display_name="WorldStereo Conditioning",
            category=CATEGORY,
            description="Puts the picture, the point-cloud render and the cameras into the conditioning, at the size "
            "in the model's table that is nearest to the picture's shape, and makes the empty latent to sample.",
            search_aliases=["worldstereo", "camera control", "image to video"],
            inputs=[
                io.Model.Input("model", tooltip="From Load WorldStereo FP8: its settings give sizes and frame counts."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input("image", tooltip="The picture to start from, taken by camera 0."),
                io.Image.Input(
                    "render_video",
                    tooltip="The point cloud seen by each camera: one frame per camera. More than the model's 21 "
                    "keyframes are thinned evenly. The first frame is replaced by the picture.",
                ),
                io.Mask.Input(
                    "render_mask",
                    tooltip="For each frame of the render: 1 (white) where there is no point. Frame 0 is the picture "
                    "itself and has no holes, whatever the mask says.",
                ),
                Cameras.Input("cameras", tooltip="One camera per frame: world-to-camera, OpenCV axes."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="The picture encoded by CLIP ViT-H (crop center). Without it the model attends only to the "
                    "text, and the result follows the picture less.",
                ),
                io.Image.Input(
                    "reference_images",
                    optional=True,
                    tooltip="Memory variants: other views of the scene, at most one for each keyframe after the first. "
                    "Without them the picture itself is the reference.",
                ),
                Cameras.Input(
                    "reference_cameras",
                    optional=True,
                    tooltip="One camera for each reference, in the same world as the cameras.",
                ),
                io.String.Input(
                    "reference_index",
                    display_name="reference_keyframes",
                    default="",
                    optional=True,
                    tooltip="For each reference the keyframe that it matches best, separated by commas: 1, 5, 12. "
                    "Keyframes are numbered from 0; keyframe 0 is the picture itself and is matched with no reference.",
                ),
                SceneReferences.Input(
                    "references",
                    optional=True,
                    tooltip="From WorldStereo Scene Path, instead of the three reference inputs above.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @checked
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        image,
        render_video,
        render_mask,
        cameras,
        clip_vision_output=None,
        reference_images=None,
        reference_cameras=None,
        reference_index="",
        references=None,
    ) -> io.NodeOutput:
        references = References.of(reference_images, reference_cameras, reference_index, references)
        config = config_of(model)
        values, latent = condition(config, vae, image, render_video, render_mask, cameras, references)
        height, width = keyframe_size(config, *image.shape[1:3])
        size = f"{width}×{height}, {latent.shape[2]} keyframes of {len(render_video)} frames"
        show_on_node(cls, size, remarks(config, image, render_video, render_mask, cameras, references))
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            {"samples": latent},
        )


class WorldStereoKeyframeDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoKeyframeDecode",
            display_name="WorldStereo Keyframe Decode",
            category=CATEGORY,
            description="Decodes each keyframe on its own, which is how WorldStereo's latents are made. The plain VAE "
            "Decode would treat them as one video and blend them.",
            search_aliases=["vae decode"],
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae", tooltip="The Wan 2.1 VAE.")],
            outputs=[io.Image.Output(tooltip="The keyframes in order, to be shown at 16 frames per second.")],
        )

    @checked
    def execute(cls, samples, vae) -> io.NodeOutput:
        return io.NodeOutput(decode_keyframes(vae, samples["samples"]))


class WorldStereoKeyframeEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoKeyframeEncode",
            display_name="WorldStereo Keyframe Encode",
            category=CATEGORY,
            description="Encodes each picture on its own into a keyframe latent, the inverse of Keyframe Decode: to "
            "start from existing frames with a denoise below 1.",
            search_aliases=["vae encode"],
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="The keyframes in order. Both sides are cropped to a multiple of 8 pixels; the model needs "
                    "multiples of 16.",
                ),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
            ],
            outputs=[io.Latent.Output()],
        )

    @checked
    def execute(cls, pixels, vae) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode_keyframes(vae, pixels[..., :3])})


class WorldStereoDMDSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDMDSigmas",
            display_name="WorldStereo DMD Sigmas",
            category=CATEGORY,
            description="The few noise levels that the memory-dmd variant was distilled for (4 steps: 1, 0.9375, "
            "0.8333, 0.625, then 0), from the model's own settings. Sample with euler and cfg 1.",
            search_aliases=["scheduler", "steps"],
            inputs=[io.Model.Input("model", tooltip="From Load WorldStereo FP8, a memory-dmd checkpoint.")],
            outputs=[io.Sigmas.Output()],
        )

    @checked
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(dmd_sigmas(config_of(model)))


NODES = [
    LoadWorldStereoFP8,
    WorldStereoConditioning,
    WorldStereoKeyframeDecode,
    WorldStereoKeyframeEncode,
    WorldStereoDMDSigmas,
]
