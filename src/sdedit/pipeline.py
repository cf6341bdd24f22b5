"""The way of one image: read, encode, noise, denoise, decode. `__call__` does these five things in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit import denoising
from sdedit.base import Pipeline
from sdedit.config import later
from sdedit.denoising import Call, Guidance, State, inference
from sdedit.inputs import checks, masks
from sdedit.inputs.image_prompts import ImageEmbeds
from sdedit.inputs.images import ImageInput, pad_to_multiple, read_images, write_images
from sdedit.inputs.opening import MAX_PIXELS
from sdedit.inputs.pixels import Images
from sdedit.models.fast.full_speed import one_run
from sdedit.models.ip_adapter import projections
from sdedit.noise import Generator, randn, retry_in_float32
from sdedit.output import StableDiffusionPipelineOutput
from sdedit.safety import check_safety
from sdedit.schedulers.runs import Run, Steps, show

AfterStep = Callable[[int, Tensor, State], State] | None


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
        **others: Any,
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
                returns in a dict replace those of the loop. Where pictures have strengths or steps of their own, it
                gets those that took the step, and timestep has one number for each.
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
            others: `callback(step, timestep, latents)` and `callback_steps`, the older way; anything else is ignored,
                with a warning.

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
        grid = checks.schedule(self.scheduler, timesteps, sigmas)
        checks.adapter_arguments(cross_attention_kwargs)
        call = self._calls.seen
        after_step = self._after_step(call, callback_on_step_end, callback_on_step_end_tensor_inputs, others)
        if image is None:
            raise ValueError("image: None; expected the picture to start from")

        # 1. Read the image and the prompt.
        call.clip_skip, call.cross_attention_kwargs = clip_skip, cross_attention_kwargs
        call.guidance = Guidance(tuple(scales), distilled=self.unet.config.time_cond_proj_dim)
        guided = call.guidance.on
        images = read_images(image, self.vae.config.latent_channels, self.max_pixels)
        region = masks.read_region(mask_image, strength_map, mask_feather, images, self.vae_scale_factor)
        weighted: dict[str, Any] = {"prompt_weighting": True} if prompt_weighting else {}  # others' know nothing of it
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
            **weighted,
        )
        settings = {"strength": strengths, "num_inference_steps": counts, "guidance_scale": scales}
        settings |= region.settings(len(images.pixels))
        of_image, of_prompt = checks.batch_plan(len(images.pixels), len(embeds), num_images_per_prompt, settings)
        checks.generators(generator, len(of_image))
        region = region.of_pictures(of_image, len(images.pixels))
        image_embeds = self._image_embeds(ip_adapter_image, ip_adapter_image_embeds, of_prompt, guided)
        texts = embeds[of_prompt], None if negative_embeds is None else negative_embeds[of_prompt]

        run = self._begin(Steps(region.limited(strengths), counts, grid, exact_steps, eta), len(of_image), generator)
        guidance = call.guidance.of_pictures(len(of_image), run.calls_within(self._guided))
        call.num_timesteps, call.scheduler = run.calls, run.scheduler

        # 2. Encode it: latents of each picture of the batch.
        clean = latents = self._encode(images, of_image, generator)

        for repeat in range(repeats if run.calls else 0):
            if repeat:
                run.restart(generator)
            # 3. Noise them to the level that strength asks for.
            noisy, noise = self._noised(run, latents, generator, extra_noise)

            # 4. Denoise; what is to stay is the source, at each level.
            state = State.begin(noisy, texts, image_embeds, region.keep(run, clean, noise), guidance)
            latents = self._denoise(call, run, state, generator, after_step)
            if call.interrupt:
                break
        show(self._scheduler, run)

        # 5. Decode, and cut off what was padded.
        pictures: tuple[Any, list[bool] | None, Any] = latents, None, None
        if output_type != "latent":
            pixels = region.composed(images.cropped(self._decode(latents)), images, of_image)
            pictures = self._written(pixels, images, region, of_image, output_type)
        out = StableDiffusionPipelineOutput(*pictures, steps=run.steps_taken, start_sigmas=run.sigmas)
        return out if return_dict else (out.images, out.nsfw_content_detected)

    def _image_embeds(self, image: Any, embeds: Any, of_prompt: list[int], guided: bool) -> ImageEmbeds:
        """The image embeds of each picture of the batch."""
        if not projections(self.unet):
            if image is not None or embeds is not None:
                name = "ip_adapter_image" if image is not None else "ip_adapter_image_embeds"
                raise ValueError(f"{name} was given, but no IP-Adapter is loaded; expected None")
            return ImageEmbeds()
        prepared = self.prepare_ip_adapter_image_embeds(image, embeds, do_classifier_free_guidance=guided)
        return ImageEmbeds.of_pictures(prepared, of_prompt, guided)

    def _begin(self, steps: Steps, pictures: int, generator: Generator) -> Run:
        """Where the pictures of the batch begin."""
        return Run.begin(self._scheduler, pictures, steps, generator, self.device)

    def _encode(self, images: Images, of_image: list[int], generator: Generator) -> Tensor:
        """Latents (B, C, h, w) of each picture of the batch, times `scaling_factor`."""
        dtype = self.unet.dtype
        if images.latent:
            return images.pixels[of_image].to(self.device, dtype)
        pixels = pad_to_multiple(images.pixels, self.vae_scale_factor)
        # With one generator an image is drawn once from the VAE's distribution, whatever the number of its pictures;
        # with a generator for each picture, from each of them.
        each = isinstance(generator, (list, tuple))

        def run(vae: Any, generator: Generator) -> Tensor:
            encoded = vae.encode(pixels.to(self.device, vae.dtype))
            if hasattr(encoded, "latents"):
                return encoded.latents[of_image]  # type: ignore[no-any-return]
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
            if each:
                mean, std = mean[of_image], std[of_image]
            drawn = mean + std * randn(mean.shape, generator, device=mean.device, dtype=mean.dtype)
            return drawn if each else drawn[of_image]

        encoded = retry_in_float32("VAE encoder", self.vae, run, generator)
        return encoded.to(dtype) * self.vae.config.scaling_factor

    def _noised(
        self, run: Run, latents: Tensor, generator: Generator, extra_noise: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) at the level that the run begins with, and the noise."""
        noise = randn(latents.shape, generator, device=latents.device, dtype=latents.dtype)
        return run.noised(latents + extra_noise * noise if extra_noise else latents, noise), noise

    def _denoise(self, call: Call, run: Run, state: State, generator: Generator, after_step: AfterStep) -> Tensor:
        """Noisy latents to clean ones; once more in float32 if half precision overflows."""

        def denoise(unet: Any, generator: Generator) -> Tensor:
            if unet is not self.unet:
                run.restart(generator)
            return self._loop(call, unet, run, state.to(unet.dtype), after_step)

        denoised = retry_in_float32("UNet", self.unet, denoise, generator)
        call.guidance = state.guidance  # of the next repeat
        return denoised

    def _loop(self, call: Call, unet: Any, run: Run, state: State, after_step: AfterStep) -> Tensor:
        """One UNet call after the other, with the pictures that have steps to go; the latents of all."""
        whole, latents, here = run, state.latents, list(range(len(state)))
        arguments = {"cross_attention_kwargs": call.cross_attention_kwargs}
        with self.progress_bar(total=max(run.steps)) as bar, one_run(unet) as kept:
            for i in range(run.calls):
                if call.interrupt:
                    break
                if len(going := run.under_way) < len(here):  # the others are done, and leave
                    latents = put(latents, here, state.latents)
                    run, state, here = run.take(going), state.take(going), [here[k] for k in going]
                state, t = denoising.step(unet, run, state, arguments)
                if after_step is not None:
                    state = after_step(i, t, state)
                    kept.clear()
                bar.update(max(whole.steps_taken) - bar.n)
        return put(latents, here, state.latents)

    def _after_step(self, call: Call, callback: Any, names: list[str] | None, others: dict[str, Any]) -> AfterStep:
        """What shows a step to the user's callback, and gives the state as that leaves it; `None` without one."""
        if others:
            callback, names = later("sdedit.compat.idioms:other_arguments")(others, callback, names)
        wanted = checks.callback(callback, names, self._callback_tensor_inputs)

        def after_step(i: int, t: Tensor, state: State) -> State:
            call.guidance = state.guidance
            result = checks.callback_result(callback(self, i, t, {name: getattr(state, name) for name in wanted}))
            changed = {name: result[name] for name in self._callback_tensor_inputs if name in result}
            return dataclasses.replace(state, guidance=call.guidance, **changed)

        return None if callback is None else after_step

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels (B, 3, H, W) in [0, 1]."""

        def run(vae: Any, _: Generator) -> Tensor:
            scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
            return vae.decode(scaled, return_dict=False)[0]  # type: ignore[no-any-return]

        return (retry_in_float32("VAE decoder", self.vae, run) / 2 + 0.5).clamp(0, 1)

    def _check(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Pictures (B, 3, H, W) in [0, 1], with what the safety checker flags made black; and its flags."""
        return check_safety(pixels, self.safety_checker, self.feature_extractor)

    def _written(
        self, pixels: Tensor, images: Images, region: masks.Region, of_image: list[int], output_type: str
    ) -> tuple[Any, list[bool] | None, Any]:
        """Pictures as the user wants them, the safety checker's flags, and, if it flagged any, all as they were."""
        checked, flags = self._check(pixels)
        alphas, profiles = [images.alphas[i] for i in of_image], region.profiles(images, of_image)
        written = write_images(checked, output_type, alphas, profiles)
        return written, flags, write_images(pixels, output_type, alphas, profiles) if flags and any(flags) else None


def put(latents: Tensor, pictures: list[int], new: Tensor) -> Tensor:
    """Latents (B, C, h, w) with those of some pictures replaced."""
    if len(pictures) == len(latents):
        return new
    return latents.index_copy(0, torch.tensor(pictures, device=latents.device), new.to(latents.dtype))
