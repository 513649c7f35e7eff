"""The network: Wan's backbone with reference views, and the control branch beside it. Letters as in `blocks`.

Source: WorldStereo (CVPR 2026) on Wan2.1-I2V-14B. Wan's own modules are ComfyUI's (`comfy.ldm.wan.model`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core import MLPProj, WanModel, sinusoidal_embedding_1d
from .attention import wants_whole_tensors
from .blocks import Block, to_tokens
from .config import (
    CAMERA_QT,
    IN_CHANNELS,
    LATENT_CHANNELS,
    MASK_CAM_CHANNELS,
    PATCH,
    SPATIAL_DOWNSCALE,
    WorldStereoConfig,
)
from .control import ControlBranch, add_control
from .object_patches import forward_is_replaced
from .prompt_cache import COMING_TIMESTEPS, WEIGHTS, WHOLE_TIMESTEPS, KeysValues, Prompt, PromptCache, Time


@torch.compiler.disable
def untraced(function: Callable, *args, **kwargs) -> Any:
    """Calls a function that torch.compile must not trace."""
    return function(*args, **kwargs)


def runs_custom_code(transformer_options: dict) -> bool:
    """Whether patches or an attention override run inside the blocks. They may read the block's number, and core's
    TorchCompileModel does not guard on transformer_options: every block would see the first block's number."""
    patched = any(transformer_options.get(key) for key in ("patches", "patches_replace"))
    return patched or wants_whole_tensors(transformer_options)


class WorldStereoModel(WanModel):
    """The diffusion model: predicts the velocity from the noisy latent and the conditions; see `_forward`."""

    def __init__(self, config: WorldStereoConfig, image_model=None, device=None, dtype=None, operations=None):
        super().__init__(
            model_type="i2v",
            patch_size=PATCH,
            in_dim=IN_CHANNELS,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            freq_dim=config.freq_dim,
            text_dim=config.text_dim,
            out_dim=LATENT_CHANNELS,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            eps=config.eps,
            wan_attn_block_class=Block,
            device=device,
            dtype=dtype,
            operations=operations,
        )
        self.config = config
        settings = {"operations": operations, "device": device, "dtype": dtype}
        self.img_emb = MLPProj(config.image_dim, config.dim, operation_settings=settings)
        if config.has_memory:
            factory = {"device": device, "dtype": dtype}
            self.camera_embedding = nn.Sequential(
                operations.Linear(CAMERA_QT, config.camera_mlp_dim, **factory),
                nn.SiLU(),
                operations.Linear(config.camera_mlp_dim, config.dim, **factory),
                nn.SiLU(),
                operations.Linear(config.dim, config.dim, **factory),
            )
        self.controlnet = ControlBranch(config, settings)
        self.prompt_cache = PromptCache()

    def _positions(self, times, height, width, first_column=0):
        """Rotary positions of whole frames. times: [b, frames]. Returns [b, frames·height·width, 3] (t, y, x)."""
        rows = torch.arange(height, device=times.device, dtype=times.dtype)
        columns = torch.arange(width, device=times.device, dtype=times.dtype) + first_column
        shape = (*times.shape, height, width)
        return torch.stack(
            [times[:, :, None, None].expand(shape), rows[:, None].expand(shape), columns.expand(shape)], dim=-1
        ).flatten(1, 3)

    def _embed_frames(self, x, camera_qt):
        """Latent frames [B,36,F,h,w] and their cameras [B,F,7] (or None) to tokens [B, F·n, C]."""
        tokens = to_tokens(self.patch_embedding(x.float()).to(x.dtype)).contiguous()
        if camera_qt is None:
            return tokens
        camera = self.camera_embedding(camera_qt)
        return tokens + camera.repeat_interleave(tokens.shape[1] // camera.shape[1], dim=1)

    def _check(
        self, x, render_latent, render_mask, camera_embedding, reference_latent, ref_index, camera_qt, camera_qt_ref
    ):
        b, _, frames, height, width = x.shape
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"WorldStereo: the latent is {width}×{height}; both must be even "
                "(pictures whose sides are multiples of 16)"
            )
        control = {"render_latent": render_latent, "render_mask": render_mask, "camera_embedding": camera_embedding}
        missing = [name for name, value in control.items() if value is None]
        if missing and len(missing) < len(control):
            raise ValueError(
                f"WorldStereo: {', '.join(missing)} missing: render_latent, render_mask and "
                "camera_embedding must be given together, or none of them, for no control branch"
            )
        references = {"reference_latent": reference_latent, "ref_index": ref_index}
        missing = [name for name, value in references.items() if value is None]
        if len(missing) == 1:
            raise ValueError(
                f"WorldStereo: {missing[0]} missing: reference_latent and ref_index must be given together"
            )
        if not self.config.has_memory and any(v is not None for v in (reference_latent, camera_qt, camera_qt_ref)):
            raise ValueError(f"WorldStereo: {self.config.model_type} takes no references and no camera_qt")
        if reference_latent is not None:
            count = reference_latent.shape[2]
            if count > frames:
                raise ValueError(f"WorldStereo: {count} references for {frames} frames; give at most one per frame")
            if ref_index.shape[-1] != count:
                raise ValueError(f"WorldStereo: {count} references but {ref_index.shape[-1]} in ref_index")
            if (camera_qt is None) != (camera_qt_ref is None):
                raise ValueError("WorldStereo: with references, camera_qt and camera_qt_ref must be given together")
        count = ref_index.shape[-1] if reference_latent is not None else 0
        mask_frames = (frames - 1) * self.config.mask_downsample + 1
        pixels = (mask_frames, SPATIAL_DOWNSCALE * height, SPATIAL_DOWNSCALE * width)
        for name, value, shape in (
            ("render_latent", render_latent, (b, LATENT_CHANNELS, frames, height, width)),
            ("render_mask", render_mask, (b, 1, *pixels)),
            ("camera_embedding", camera_embedding, (b, MASK_CAM_CHANNELS - 1, *pixels)),
            ("camera_qt", camera_qt, (b, frames, CAMERA_QT)),
            ("reference_latent", reference_latent, (b, IN_CHANNELS, count, height, width)),
            ("camera_qt_ref", camera_qt_ref, (b, count, CAMERA_QT)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"WorldStereo: {name} is {tuple(value.shape)}, expected {shape} for a latent of {tuple(x.shape)}"
                )

    @torch.compiler.disable(recursive=False)  # torch.compile gets the blocks, which share one graph, not their loop
    def _forward(
        self,
        x,
        timestep,
        context,
        clip_fea=None,
        time_dim_concat=None,
        transformer_options={},
        render_latent=None,
        render_mask=None,
        camera_embedding=None,
        reference_latent=None,
        ref_index=None,
        camera_qt=None,
        camera_qt_ref=None,
        **kwargs,
    ):
        """The forward pass.

        x: [B,36,F,h,w] noisy latent, mask, condition latent. timestep: [B], sigma·1000. context: [B,512,text_dim].
        clip_fea: [B,257,image_dim]; without it only the text is attended to.
        render_latent [B,16,F,h,w], render_mask [B,1,Fm,8h,8w], camera_embedding [B,6,Fm,8h,8w]: all three, or none
        for no control branch. Fm = F, or d(F−1)+1 where the mask kernel's time size is d.
        reference_latent [B,36,R,h,w], ref_index [R] or [B,R], camera_qt [B,F,7], camera_qt_ref [B,R,7]: only for the
        memory variants; without references the targets attend only to each other.
        Returns the velocity, [B,16,F,h,w]. Raises ValueError for inputs that do not fit together.
        """
        self._check(
            x, render_latent, render_mask, camera_embedding, reference_latent, ref_index, camera_qt, camera_qt_ref
        )
        frames, rows, columns = x.shape[2], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2]
        grid = transformer_options["grid_sizes"] = (frames, rows, columns)

        freqs = self.rope_encode(
            *x.shape[2:], device=x.device, dtype=torch.float32, transformer_options=transformer_options
        )
        cache = self._cache(transformer_options)
        times = self._times(cache, timestep.flatten().expand(len(x)), x.dtype, x.device, transformer_options)
        prompts = cache.prompts_of(
            [(context[b : b + 1], None if clip_fea is None else clip_fea[b : b + 1]) for b in range(len(x))],
            self._prompt,
        )
        e, temb = (torch.cat([getattr(time, name) for time in times]) for name in ("e", "temb"))

        control = None
        if render_latent is not None:
            control = self.controlnet.embed(x[:, : LATENT_CHANNELS + 4], render_latent, render_mask, camera_embedding)
            frame_times = torch.arange(frames, device=x.device, dtype=torch.float32)[None]
            control_freqs = self.controlnet.rope_embedder(self._positions(frame_times, rows, columns)).movedim(1, 2)

        model_input = x
        x = self._embed_frames(x, camera_qt)
        ref_len, references = 0, None
        if reference_latent is not None:
            references = self._embed_frames(reference_latent, camera_qt_ref)
            ref_len = references.shape[1]
            ref_times = torch.atleast_2d(ref_index).to(device=x.device, dtype=torch.float32) + 1
            ref_freqs = self.rope_embedder(self._positions(ref_times, rows, columns, first_column=columns)).movedim(
                1, 2
            )
            freqs = torch.cat([ref_freqs, freqs.expand(len(ref_freqs), *freqs.shape[1:])], dim=1)
            x = torch.cat([references, x], dim=1)
            if self.config.update_ref:
                references = None

        patches = transformer_options.get("patches", {})
        blocks_replace = transformer_options.get("patches_replace", {}).get("dit", {})
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        # Patches are written for the backbone's tokens; an attention override is meant for all attention.
        control_options = {k: v for k, v in transformer_options.items() if not k.startswith("patches")}
        custom = runs_custom_code(transformer_options) or self._replaced_forwards()
        context = torch.cat([prompt.context for prompt in prompts]) if custom else None
        image_len = None if clip_fea is None else clip_fea.shape[1]
        run_control = functools.partial(untraced, add_control) if custom else add_control
        for i, block in enumerate(self.blocks):
            # After the last block only the head and patches read the result, and the head reads only the targets. That
            # block runs untraced, so that there is one graph for all others.
            targets_only = ref_len > 0 and i == len(self.blocks) - 1 and not custom
            run_block = functools.partial(untraced, block) if custom or targets_only else block
            transformer_options["block_index"] = control_options["block_index"] = i
            if references is not None and i > 0:
                x[:, :ref_len] = references

            if ("double_block", i) in blocks_replace:

                def run(args, i=i, run_block=run_block):
                    return {
                        "img": run_block(
                            args["img"].clone(),
                            args["vec"],
                            args["pe"],
                            self._keys_values(i, args["txt"], image_len, prompts),
                            ref_len=ref_len,
                            context=args["txt"],
                            image_len=image_len,
                            transformer_options=args["transformer_options"],
                        )
                    }

                args = {"img": x, "txt": context, "vec": e, "pe": freqs, "transformer_options": transformer_options}
                x = blocks_replace[("double_block", i)](args, {"original_block": run})["img"].clone()
            else:
                x = run_block(
                    x,
                    e,
                    freqs,
                    [prompt.blocks[i] for prompt in prompts],
                    ref_len=ref_len,
                    context=context,
                    image_len=image_len,
                    transformer_options=transformer_options,
                    targets_only=targets_only,
                )

            if control is not None and i < len(self.controlnet.controlnet_blocks):
                run_control(
                    self.controlnet.controlnet_blocks[i],
                    self.controlnet.proj_out[i],
                    control,
                    [time.control[i] for time in times],
                    control_freqs,
                    control_options,
                    x[:, ref_len:],
                )

            for patch in patches.get("double_block", []):
                x = patch(
                    {
                        "img": x,
                        "x": model_input,
                        "vec": temb,
                        "block_index": i,
                        "img_offset": ref_len,
                        "transformer_options": transformer_options,
                    }
                )["img"].clone()

        return self.unpatchify(self.head(x[:, ref_len:], temb), grid)

    def _cache(self, transformer_options) -> PromptCache:
        """The model's cache if the sampling model says which weights it runs with, else an empty one for this call
        only."""
        weights = transformer_options.get(WEIGHTS)
        if weights is None:
            return PromptCache()
        self.prompt_cache.use_weights((weights, [forward_is_replaced(block.cross_attn) for block in self.blocks]))
        return self.prompt_cache

    @torch.compiler.disable
    def _times(self, cache: PromptCache, timestep, dtype, device, transformer_options) -> list[Time]:
        """What depends only on the timestep, for each sample."""

        def compute(timesteps: list[float]) -> list[Time]:
            t = torch.tensor(timesteps, device=device)
            temb = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).to(dtype)).unsqueeze(1)
            e = self.time_projection(temb).unflatten(2, (6, self.dim))
            activated = nn.functional.silu(temb)
            control = [block.modulation(activated) for block in self.controlnet.controlnet_blocks]
            return [
                Time(temb[s : s + 1], e[s : s + 1], [tuple(m[s : s + 1] for m in block) for block in control])
                for s in range(len(timesteps))
            ]

        wanted, coming = timestep.float().tolist(), transformer_options.get(COMING_TIMESTEPS, [])
        if transformer_options.get(WHOLE_TIMESTEPS):
            wanted, coming = ([float(int(t)) for t in timesteps] for timesteps in (wanted, coming))
        return cache.timesteps(wanted, coming, (dtype, device), compute)

    def _prompt(self, context, clip_fea) -> Prompt:
        """What depends only on one sample's text [1,512,text_dim] and picture [1,257,image_dim] (or None)."""
        text = self.text_embedding(context)
        image = None if clip_fea is None else self.img_emb(clip_fea)
        embedded = text if image is None else torch.cat([image, text], dim=1)
        blocks = [
            None if forward_is_replaced(block.cross_attn) else block.cross_attn.keys_values(text, image)
            for block in self.blocks
        ]
        return Prompt(embedded, blocks)

    def _keys_values(self, i: int, context, image_len: int | None, prompts: list[Prompt]) -> list[KeysValues | None]:
        """Keys and values of block i for each sample of a context [B, I+T, C]: cached ones, unless a patch has changed
        the context."""
        attention = self.blocks[i].cross_attn
        image_len = image_len or 0
        kv = []
        for sample in context.split(1):
            unchanged = [prompt.blocks[i] for prompt in prompts if torch.equal(prompt.context, sample)]
            if unchanged or forward_is_replaced(attention):
                kv.append(unchanged[0] if unchanged else None)
            else:
                kv.append(attention.keys_values(sample[:, image_len:], sample[:, :image_len] if image_len else None))
        return kv

    def _replaced_forwards(self) -> bool:
        """Whether patches replace the `forward` of attention or feed-forward in the backbone's blocks."""
        return any(
            forward_is_replaced(module)
            for block in self.blocks
            for module in (block.self_attn, block.cross_attn, block.ffn)
        )
