"""Nodes for the demo and the tests alone: stand-ins for the text encoder and for CLIP vision, and a look inside a
conditioning.

ComfyUI fixes the sizes of UMT5-XXL and CLIP ViT-H, so there can be no toy files of them. These give embeddings of the
real shapes that depend on the text and the picture, and mean nothing.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file


class TextEncoder:
    """What CLIPTextEncode and WorldStereo Prompt need of a CLIP: one random vector for each word, zero-padded to
    [1, 512, 4096]."""

    def tokenize(self, text: str) -> dict[str, list]:
        return {"umt5xxl": [[(word, 1.0) for word in text.split()]]}

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]):
        embedding = torch.zeros(1, 512, 4096)
        for position, (word, _) in enumerate(tokens["umt5xxl"][0][:512]):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            embedding[0, position] = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        return [[embedding, {}]]


class VisionEncoder:
    """What CLIPVisionEncode needs of a CLIP vision model: the picture's 16x16 mean colours, projected to [1, 257, 1280]."""

    def encode_image(self, image: torch.Tensor, crop: bool = True):
        patches = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), 16).flatten(2).mT
        projection = torch.randn(3, 1280, generator=torch.Generator().manual_seed(0))
        hidden = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) @ projection
        return SimpleNamespace(penultimate_hidden_states=hidden, last_hidden_state=hidden, image_embeds=hidden[:, 0])


class StandInTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoTextEncoder",
            display_name="Demo stand-in: text encoder",
            description="Stands in for UMT5-XXL in the demo. Its embeddings mean nothing.",
            category="WorldStereo/demo",
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(TextEncoder())


class StandInVisionEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoVisionEncoder",
            display_name="Demo stand-in: CLIP vision",
            description="Stands in for CLIP ViT-H in the demo. Its embeddings mean nothing.",
            category="WorldStereo/demo",
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(VisionEncoder())


class SaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WorldStereoDemoSaveConditioning",
            display_name="Demo: save conditioning",
            description="Writes the tensors inside a conditioning, and a latent, into the output folder, for the tests.",
            category="WorldStereo/demo",
            inputs=[io.Conditioning.Input("conditioning"), io.Latent.Input("latent"), io.String.Input("name")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning, latent, name) -> io.NodeOutput:
        values = {key: value for key, value in conditioning[0][1].items() if isinstance(value, torch.Tensor)}
        values["latent"] = latent["samples"]
        values = {key: value.contiguous() for key, value in values.items()}
        save_file(values, Path(folder_paths.get_output_directory()) / f"{Path(name).name}.safetensors")
        return io.NodeOutput()


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StandInTextEncoder, StandInVisionEncoder, SaveConditioning]


async def comfy_entrypoint() -> DemoExtension:
    return DemoExtension()
