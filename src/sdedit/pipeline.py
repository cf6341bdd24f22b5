"""The way of one image: read, encode, noise, denoise, decode. `__call__` does these five things in this order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit.base import Pipeline
from sdedit.inputs import checks, masks, prompts
from sdedit.inputs.image_prompts import ImageEmbeds
from sdedit.inputs.images import ImageInput, Images, pad_to_multiple, read_images, write_images
from sdedit.inputs.pixels import MAX_PIXELS
from sdedit.models.offload import inference
from sdedit.models.unet import one_run
from sdedit.noise import Generator, randn, retry_in_float32
from sdedit.output import StableDiffusionPipelineOutput
from sdedit.safety import check_safety
from sdedit.schedulers import runs


class StableDiffusionImg2ImgPipeline(Pipeline):
    """Image-to-image with Stable Diffusion 1.x and 2.x.

    Example:
        >>> from sdedit import StableDiffusionImg2ImgPipeline
        >>> pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
        >>> pipe("red apple, 3d", image=doodle, strength=0.7).images[0].save("apple.png")

    Args:
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        text_encoder, tokenizer: CLIP's, from transformers; both may be `None` if prompt embeds are passed.
        unet: `UNet2DConditionModel`.
        scheduler: Any of `sdedit.schedulers`.
        safety_checker, feature_extractor: Both or neither; without them nothing is checked.
        image_encoder: CLIP's vision model, for IP-Adapter.
        requires_safety_checker: Kept in model_index.json, for other tools.

    Attributes:
        max_pixels: Larger input images are refused; `None` for no limit.
        num_timesteps: UNet calls of the running or last call, for each of its repeats.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        checks.components(self.components)
        self.max_pixels: int | None = MAX_PIXELS
        self.num_timesteps = 0
        self._guidance_scale: float | list[float] = 0.0

    @inference
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float | Sequence[float] = 0.8,
        num_inference_steps: int | Sequence[int] = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | Sequence[float] = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = ["latents"],  # noqa: B006 (the ecosystem's default)
        exact_steps: bool = False,
        extra_noise: float = 0.0,
        prompt_weighting: bool = False,
        repeats: int = 1,
        mask_image: ImageInput | None = None,
        strength_map: ImageInput | None = None,
        mask_feather: int = 4,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Turn an image into a picture that follows the prompt.

        Args:
            prompt: One, or a list. One image goes with all prompts, one prompt with all images.
            image: PIL, NumPy, tensor, latents, or a list of one kind, all of one size: see `read_images`.
            strength: How far from the image the picture may go, 0 to 1: of `num_inference_steps`, the last
                `int(num_inference_steps * strength)` run, from latents noised to where they begin. 0 gives the image
                through the VAE and back. One for all, or one for each picture.
            num_inference_steps: Steps of the whole schedule, at least 1. One for all, or one for each picture.
            timesteps, sigmas: A schedule of one's own, falling, for schedulers that take one.
            guidance_scale: Weight of the prompt against the negative prompt (arXiv 2207.12598); 1 and less turn it off.
                One for all, or one for each picture.
            negative_prompt: What to go away from; one for all, or a list as long as `prompt`.
            num_images_per_prompt: Pictures for each prompt.
            eta: 0 for deterministic DDIM, 1 for as much noise as DDPM (arXiv 2010.02502); DDIM only.
            generator: A `torch.Generator`, or a list with one for each picture: each is then the same as alone.
            prompt_embeds, negative_prompt_embeds: Instead of prompts, (B, M, C), as `encode_prompt` gives.
            ip_adapter_image, ip_adapter_image_embeds: For IP-Adapters, see `prepare_ip_adapter_image_embeds`.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: `False` for a tuple (images, nsfw_content_detected).
            cross_attention_kwargs: `{"scale": s}`, the strength of adapters.
            clip_skip: Leave out that many of the text encoder's last layers.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; tensors that it
                returns in a dict replace those of the loop. Pictures with strengths or steps of their own come
                in the order of falling number of steps, and timestep holds those of the pictures still under way.
            callback_on_step_end_tensor_inputs: Which tensors it gets.
            exact_steps: Run all of `num_inference_steps`, squeezed into the times below `strength` of the schedule;
                strength is then continuous (0.834 and 0.843 differ).
            extra_noise: Add so much of the noise to the clean latents too, against blur at low strength (0 to 1).
            prompt_weighting: Read prompts as AUTOMATIC1111's web UI does, `(word:1.2)`, of any length: see `weighting`.
            repeats: Noise and denoise so often, each time with fresh noise (SDEdit's K): more realistic, slower.
            mask_image: Where the image may change: white (1) changes, black (0) stays to the bit, grey mixes both.
                Of the image's size; one for all, or one for each image or picture: see `masks.read_mask`.
            strength_map: The strength of each pixel, 0 (black) to 1 (white), likewise; `strength` is the most that any
                of them gets. Where it is 0, the image stays to the bit.
            mask_feather: Pixels over which the change fades in from the edges of mask and map, inwards; 0: at once.

        Returns:
            `StableDiffusionPipelineOutput`, images of exactly the input's size, with its alpha channel if it had one.

        Raises:
            ValueError, TypeError: An argument is not as described; the message names it.
        """
        strengths = checks.each("strength", strength, checks.number, 0, 1)
        counts = checks.each("num_inference_steps", num_inference_steps, checks.whole_number, 1)
        scales = checks.each("guidance_scale", guidance_scale, checks.number)
        num_images_per_prompt = checks.whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        eta = checks.number("eta", eta, 0, 1)
        extra_noise = checks.number("extra_noise", extra_noise, 0, 1)
        repeats = checks.whole_number("repeats", repeats, 1)
        mask_feather = checks.whole_number("mask_feather", mask_feather, 0)
        checks.output_type(output_type)
        checks.schedule(self.scheduler, timesteps, sigmas)
        checks.adapter_arguments(cross_attention_kwargs)
        wanted = checks.callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if image is None:
            raise ValueError("image: None; expected the picture to start from")

        # 1. Read the image and the prompt.
        images = read_images(image, self.vae.config.latent_channels, self.max_pixels)
        region = masks.read_region(mask_image, strength_map, mask_feather, images, self.vae_scale_factor)
        self._guidance_scale, self._interrupt = scales[0] if len(scales) == 1 else scales, False
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
            prompt_weighting=prompt_weighting,
        )
        settings = {"strength": strengths, "num_inference_steps": counts, "guidance_scale": scales}
        settings |= region.settings(len(images.pixels))
        of_image, of_prompt = checks.batch_plan(len(images.pixels), len(embeds), num_images_per_prompt, settings)
        region = region.of_pictures(of_image, len(images.pixels))
        settings["strength"] = region.limited(strengths)
        checks.generators(generator, len(of_image))
        image_embeds = self._image_embeds(ip_adapter_image, ip_adapter_image_embeds, of_prompt)
        embeds = embeds[of_prompt]
        negative_embeds = None if negative_embeds is None else negative_embeds[of_prompt]

        # 2. Encode it: latents of each picture of the batch.
        latents = self._encode(images, of_image, generator)

        # 3. Noise them to the level that strength asks for.
        grid = {"timesteps": timesteps, "sigmas": sigmas}
        starts = runs.starts(self.scheduler, len(latents), settings, grid, exact=exact_steps, device=self.device)
        self.num_timesteps = max(len(start.timesteps) for start in starts)
        run, clean = runs.make(starts, len(latents), eta, generator), latents
        for repeat in range(repeats if self.num_timesteps else 0):
            if repeat:
                run.restart()
            noise = randn(latents.shape, generator, device=latents.device, dtype=latents.dtype)
            latents = runs.noised(starts, latents + extra_noise * noise if extra_noise else latents, noise)

            # 4. Denoise; what is to stay is the source, at each level.
            keep = region.keep(starts, clean, noise)
            arguments = {"cross_attention_kwargs": cross_attention_kwargs, "return_dict": False}
            latents = self._denoise(
                run, latents, keep, embeds, negative_embeds, image_embeds, arguments, (callback_on_step_end, wanted)
            )
            if self._interrupt:
                break
        ran: dict[str, Any] = {"steps": [s.steps for s in starts], "start_sigmas": [s.sigma for s in starts]}
        if output_type == "latent":
            return StableDiffusionPipelineOutput(latents, **ran) if return_dict else (latents, None)

        # 5. Decode, and cut off what was padded.
        pixels = region.composed(images.cropped(self._decode(latents)), images, of_image)
        checked, flags = check_safety(pixels, self.safety_checker, self.feature_extractor)
        alphas = [images.alphas[i] for i in of_image]
        written = write_images(checked, output_type, alphas)
        if not return_dict:
            return written, flags
        originals = write_images(pixels, output_type, alphas) if flags and any(flags) else None
        return StableDiffusionPipelineOutput(written, flags, originals, **ran)

    def _encode(self, images: Images, of_image: list[int], generator: Generator) -> Tensor:
        """Latents (B, C, h, w) of each picture of the batch, times `scaling_factor`."""
        dtype = self.unet.dtype
        if images.latent:
            return images.pixels[of_image].to(self.device, dtype)
        pixels = pad_to_multiple(images.pixels, self.vae_scale_factor)
        # With one generator an image is drawn once from the VAE's distribution, whatever the number of its pictures;
        # with a generator for each picture, from each of them.
        each = isinstance(generator, (list, tuple))
        vae = self.vae

        def run(dtype: torch.dtype) -> Tensor:
            encoded = vae.encode(pixels.to(self.device, dtype))
            if hasattr(encoded, "latents"):
                return encoded.latents[of_image]  # type: ignore[no-any-return]
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
            if each:
                mean, std = mean[of_image], std[of_image]
            drawn = mean + std * randn(mean.shape, generator, device=mean.device, dtype=mean.dtype)
            return drawn if each else drawn[of_image]

        return retry_in_float32("VAE encoder", vae, run, generator).to(dtype) * vae.config.scaling_factor

    def _denoise(
        self,
        run: runs.Run,
        latents: Tensor,
        keep: masks.Keep,
        embeds: Tensor,
        negative_embeds: Tensor | None,
        image_embeds: ImageEmbeds,
        unet_arguments: dict[str, Any],
        callback: tuple[Callable[..., dict[str, Any]] | None, list[str]],
    ) -> Tensor:
        """Noisy latents to clean ones, one UNet call a step; once more in float32 if half precision overflows."""
        # Pictures with most steps come first, so that those that still have some are a slice of the batch.
        order = run.order_of_pictures
        embeds, negative_embeds = embeds[order], None if negative_embeds is None else negative_embeds[order]
        # Callbacks know prompt embeds as the UNet's batch: the negative half first.
        both = embeds if negative_embeds is None else torch.cat([negative_embeds, embeds])
        tensors: dict[str, Any] = {"latents": latents[order], "image_embeds": image_embeds.reordered(order)}
        tensors |= {"keep": keep.reordered(order), "prompt_embeds": both, "negative_prompt_embeds": negative_embeds}
        scale, own = self._guidance_scale, self.unet.dtype
        scale = [scale[i] for i in order] if isinstance(scale, list) else scale

        def denoise(dtype: torch.dtype) -> Tensor:
            self._guidance_scale = scale  # it may have been changed on the way
            if dtype != own:
                run.restart()
            cast = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
            return self._loop(run, cast, unet_arguments, callback)

        asked = self._guidance_scale
        denoised = retry_in_float32("UNet", self.unet, denoise, run.generator)
        self._guidance_scale = asked  # of the next repeat
        return denoised[torch.tensor(order).argsort()]

    def _loop(
        self,
        run: runs.Run,
        tensors: dict[str, Any],
        unet_arguments: dict[str, Any],
        callback: tuple[Callable[..., dict[str, Any]] | None, list[str]],
    ) -> Tensor:
        on_step_end, wanted = callback
        condition = self._guidance_embedding(tensors["latents"])
        with self._progress(-(-len(run) // run.order)) as bar, one_run(self.unet) as kept:
            for i in range(len(run)):
                if self._interrupt:
                    break
                # Pictures with steps of their own may have none left; those that have some come first.
                count, latents = run.active(i), tensors["latents"]
                sample, t = run.model_input(i, latents[:count])
                self._end_guidance(i / len(run), tensors)
                embeds = runs.first(tensors["prompt_embeds"], count, len(latents))
                guided = self.do_classifier_free_guidance
                if guided and not getattr(self.unet, "repeats_sample", False):
                    sample, t = torch.cat([sample] * 2), torch.cat([t] * 2) if t.ndim else t
                extra = {
                    "timestep_cond": runs.first(condition, count),
                    **tensors["image_embeds"].arguments(count, guided),
                }
                prediction = self.unet(sample, t, embeds, **extra, **unet_arguments)[0]
                if guided:
                    without, with_prompt = prediction.chunk(2)
                    prediction = without + self._guidance_weight(without) * (with_prompt - without)
                stepped = run.step(i, prediction, latents[:count])
                stepped = tensors["keep"].restored(run, i, stepped)
                tensors["latents"] = stepped if count == len(latents) else torch.cat([stepped, latents[count:]])
                if on_step_end is not None:
                    seen = {name: tensors[name] for name in wanted}
                    tensors.update(checks.callback_result(on_step_end(self, i, t, seen)))
                    kept.clear()
                if (i + 1) % run.order == 0 or i + 1 == len(run):
                    bar.update()
        return tensors["latents"]

    def _guidance_embedding(self, latents: Tensor) -> Tensor | None:
        """What a model distilled with guidance is told of it, (B, C)."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return None
        return prompts.guidance_scale_embedding(self._scales(len(latents)), dim).to(latents)

    def _guidance_weight(self, like: Tensor) -> float | Tensor:
        """The guidance scale, or those of the pictures (B, 1, 1, 1); 1 where a picture asks for none."""
        if not isinstance(self._guidance_scale, list):
            return self._guidance_scale
        weights = [max(scale, 1.0) for scale in self._scales(len(like))]
        return torch.tensor(weights, dtype=like.dtype).to(like.device).view(-1, 1, 1, 1)

    def _scales(self, count: int) -> list[float]:
        scale = self._guidance_scale
        return scale[:count] if isinstance(scale, list) else [scale] * count

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels (B, 3, H, W) in [0, 1]."""
        vae = self.vae

        def run(dtype: torch.dtype) -> Tensor:
            scaled = latents.to(self.device, dtype) / vae.config.scaling_factor
            return vae.decode(scaled, return_dict=False)[0]  # type: ignore[no-any-return]

        return (retry_in_float32("VAE decoder", vae, run) / 2 + 0.5).clamp(0, 1)

    @property
    def guidance_scale(self) -> float | list[float]:
        """Guidance scale of the running or last call, or those of its pictures."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Is the UNet called with and without the prompt?"""
        scale = self._guidance_scale
        return (max(scale) if isinstance(scale, list) else scale) > 1 and self.unet.config.time_cond_proj_dim is None
