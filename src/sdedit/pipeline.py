"""The way of one image: read, encode, noise, denoise, decode. `__call__` does these five things in this order."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdedit import checks, prompts
from sdedit.base import Pipeline
from sdedit.images import MAX_PIXELS, ImageInput, Images, pad_to_multiple, read_images, write_images
from sdedit.models.adapters import scaled
from sdedit.noise import Generator, randn
from sdedit.output import StableDiffusionPipelineOutput
from sdedit.precision import finite
from sdedit.safety import check_safety


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
        num_timesteps: Steps that the last call ran.
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
        self._guidance_scale = 0.0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
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
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Turn an image into a picture that follows the prompt.

        Args:
            prompt: One, or a list. One image goes with all prompts, one prompt with all images.
            image: PIL, NumPy, tensor, latents, or a list of one kind, all of one size: see `read_images`.
            strength: How far from the image the picture may go, 0 to 1: of `num_inference_steps`, the last
                `int(num_inference_steps * strength)` run, from latents noised to where they begin. 0 gives the image
                through the VAE and back.
            num_inference_steps: Steps of the whole schedule, at least 1.
            timesteps, sigmas: A schedule of one's own, falling, for schedulers that take one.
            guidance_scale: Weight of the prompt against the negative prompt (arXiv 2207.12598); 1 and less turn it off.
            negative_prompt: What to go away from; one for all, or a list as long as `prompt`.
            num_images_per_prompt: Pictures for each prompt.
            eta: 0 for deterministic DDIM, 1 for as much noise as DDPM (arXiv 2010.02502); DDIM only.
            generator: A `torch.Generator`, or a list with one for each picture: each is then the same as alone.
            prompt_embeds, negative_prompt_embeds: Instead of prompts, (B, M, C), as `encode_prompt` gives.
            ip_adapter_image, ip_adapter_image_embeds: For IP-Adapters.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: `False` for a tuple (images, nsfw_content_detected).
            cross_attention_kwargs: `{"scale": s}`, the strength of adapters.
            clip_skip: Leave out that many of the text encoder's last layers.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; tensors that it
                returns in a dict replace those of the loop.
            callback_on_step_end_tensor_inputs: Which tensors it gets.

        Returns:
            `StableDiffusionPipelineOutput`, images of exactly the input's size, with its alpha channel if it had one.

        Raises:
            ValueError, TypeError: An argument is not as described; the message names it.
        """
        strength = checks.number("strength", strength, 0, 1)
        num_inference_steps = checks.whole_number("num_inference_steps", num_inference_steps, 1)
        num_images_per_prompt = checks.whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        guidance_scale = checks.number("guidance_scale", guidance_scale)
        eta = checks.number("eta", eta, 0, 1)
        checks.output_type(output_type)
        checks.schedule(self.scheduler, timesteps, sigmas)
        checks.adapter_arguments(
            cross_attention_kwargs,
            {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds},
        )
        wanted = checks.callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if image is None:
            raise ValueError("image: None; expected the picture to start from")

        # 1. Read the image and the prompt.
        images = read_images(image, self.vae.config.latent_channels, self.max_pixels)
        height, width = images.pixels.shape[-2:]
        self._guidance_scale, self._interrupt = guidance_scale, False
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        of_image, of_prompt = checks.batch_plan(len(images.pixels), len(embeds), num_images_per_prompt)
        checks.generators(generator, len(of_image))
        embeds = embeds[of_prompt]
        negative_embeds = None if negative_embeds is None else negative_embeds[of_prompt]

        # 2. Encode it: latents of each picture of the batch.
        latents = self._encode(images, of_image, generator)

        # 3. Noise them to the level that strength asks for.
        start = functools.partial(self._timesteps, num_inference_steps, strength, timesteps, sigmas)
        steps = start()
        if len(steps):
            noise = randn(latents.shape, generator, device=latents.device, dtype=latents.dtype)
            latents = self.scheduler.add_noise(latents, noise, steps[:1].repeat(len(latents)))

        # 4. Denoise.
        if len(steps):
            latents = self._denoise(
                latents,
                steps,
                embeds,
                negative_embeds,
                self._unet_arguments(cross_attention_kwargs, len(latents)),
                self._step_arguments(eta, generator),
                (callback_on_step_end, wanted),
                start,
            )
        if output_type == "latent":
            return StableDiffusionPipelineOutput(latents) if return_dict else (latents, None)

        # 5. Decode, and cut off what was padded.
        pixels = self._decode(latents)
        if not images.latent:
            pixels = pixels[..., :height, :width]
        checked, flags = check_safety(pixels, self.safety_checker, self.feature_extractor)
        alphas = [images.alphas[i] for i in of_image]
        written = write_images(checked, output_type, alphas)
        if not return_dict:
            return written, flags
        originals = write_images(pixels, output_type, alphas) if flags and any(flags) else None
        return StableDiffusionPipelineOutput(written, flags, originals)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts, or pass on embeds that were made before.

        Args:
            prompt, negative_prompt: Strings, or lists of them; a single negative prompt serves all prompts.
            num_images_per_prompt: Each is repeated that often.
            do_classifier_free_guidance: Without it there are no negative embeds.
            lora_scale: Strength of the text encoder's adapters.
            clip_skip: Leave out that many of the last layers (of the prompt; the negative one is read in full).

        Returns:
            Prompt embeds and negative prompt embeds, (B·num_images_per_prompt, M, C) each.
        """
        checks.either("prompt", prompt, "prompt_embeds", prompt_embeds)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            checks.either("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds)
        if clip_skip is not None:
            checks.whole_number("clip_skip", clip_skip, 0)
        negative = checks.prompts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        width = self.unet.config.cross_attention_dim
        dtype, device = self.unet.dtype, device or self.device

        if prompt_embeds is None:
            prompt_embeds = self._encode_texts(checks.prompts("prompt", prompt), lora_scale, clip_skip)
        prompt_embeds = checks.embeds("prompt_embeds", prompt_embeds, width).to(device, dtype)
        count, length = prompt_embeds.shape[:2]

        if not do_classifier_free_guidance:
            return prompt_embeds.repeat_interleave(num_images_per_prompt, 0), None
        if negative_prompt_embeds is None:
            if len(negative) not in (1, count):
                raise ValueError(
                    f"negative_prompt: {len(negative)} of them for {count} prompts; expected one, or as many"
                )
            negative_prompt_embeds = self._encode_texts(negative, lora_scale, max_length=length)
        negative_prompt_embeds = checks.embeds("negative_prompt_embeds", negative_prompt_embeds, width).to(
            device, dtype
        )
        if len(negative_prompt_embeds) == 1:
            negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
        if negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds: {list(negative_prompt_embeds.shape)}; "
                f"expected the shape of prompt_embeds, {list(prompt_embeds.shape)}"
            )
        return (
            prompt_embeds.repeat_interleave(num_images_per_prompt, 0),
            negative_prompt_embeds.repeat_interleave(num_images_per_prompt, 0),
        )

    def _encode_texts(
        self, texts: list[str], lora_scale: float | None, clip_skip: int | None = None, max_length: int | None = None
    ) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt: this pipeline has no text encoder; pass prompt_embeds and negative_prompt_embeds")
        ids = prompts.tokenize(self.tokenizer, texts, max_length)
        encoder = self.text_encoder
        with scaled(encoder, lora_scale):
            return finite("text encoder", encoder, lambda dtype: prompts.encode(encoder, ids, clip_skip))

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

        return finite("VAE encoder", vae, run, generator).to(dtype) * vae.config.scaling_factor

    def _timesteps(
        self, num_inference_steps: int, strength: float, timesteps: Any = None, sigmas: Any = None
    ) -> Tensor:
        """The timesteps that `strength` leaves of the schedule, from the noisiest on."""
        own = {"timesteps": timesteps} if timesteps is not None else {"sigmas": sigmas} if sigmas is not None else None
        if own is None:
            self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        else:
            self.scheduler.set_timesteps(device=self.device, **own)
            num_inference_steps = len(self.scheduler.timesteps)
        start = num_inference_steps - int(num_inference_steps * strength)
        first = start * getattr(self.scheduler, "order", 1)
        steps: Tensor = self.scheduler.timesteps[first:]
        if len(steps) and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        self.num_timesteps = len(steps)
        if strength > 0 and not len(steps):
            warnings.warn(
                f"strength={strength:g} of {num_inference_steps} steps leaves none to run: "
                "the picture is the image through the VAE; more steps or strength change it",
                stacklevel=3,
            )
        return steps

    def _unet_arguments(self, cross_attention_kwargs: dict[str, Any] | None, batch: int) -> dict[str, Any]:
        """What every call of the UNet gets beside latents, time and text."""
        dim = self.unet.config.time_cond_proj_dim
        condition = None if dim is None else prompts.guidance_scale_embedding(self.guidance_scale, dim, batch)
        return {"timestep_cond": condition, "cross_attention_kwargs": cross_attention_kwargs, "return_dict": False}

    def _step_arguments(self, eta: float, generator: Generator) -> dict[str, Any]:
        """What this scheduler's `step` takes of `eta` and `generator`."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in taken}

    def _denoise(
        self,
        latents: Tensor,
        steps: Tensor,
        embeds: Tensor,
        negative_embeds: Tensor | None,
        unet_arguments: dict[str, Any],
        step_arguments: dict[str, Any],
        callback: tuple[Callable[..., dict[str, Any]] | None, list[str]],
        restart: Callable[[], Tensor],
    ) -> Tensor:
        """Noisy latents to clean ones, one UNet call a timestep; `restart` readies the scheduler for a second run."""
        # Callbacks know prompt embeds as the UNet's batch: the negative half first.
        both = embeds if negative_embeds is None else torch.cat([negative_embeds, embeds])
        tensors = {"latents": latents, "prompt_embeds": both, "negative_prompt_embeds": negative_embeds}
        own, scale = self.unet.dtype, self._guidance_scale  # a callback may change the scale

        def run(dtype: torch.dtype) -> Tensor:
            self._guidance_scale = scale
            cast = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
            condition = unet_arguments["timestep_cond"]
            extra = {**unet_arguments, "timestep_cond": None if condition is None else condition.to(cast["latents"])}
            return self._loop(steps if dtype == own else restart(), cast, extra, step_arguments, callback)

        return finite("UNet", self.unet, run, step_arguments.get("generator"))

    def _loop(
        self,
        steps: Tensor,
        tensors: dict[str, Any],
        unet_arguments: dict[str, Any],
        step_arguments: dict[str, Any],
        callback: tuple[Callable[..., dict[str, Any]] | None, list[str]],
    ) -> Tensor:
        on_step_end, wanted = callback
        order = getattr(self.scheduler, "order", 1)
        with self._progress(-(-len(steps) // order)) as bar:
            for i, t in enumerate(steps):
                if self._interrupt:
                    break
                latents, guided = tensors["latents"], self.do_classifier_free_guidance
                sample = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
                prediction = self.unet(sample, t, tensors["prompt_embeds"], **unet_arguments)[0]
                if guided:
                    without, with_prompt = prediction.chunk(2)
                    prediction = without + self.guidance_scale * (with_prompt - without)
                tensors["latents"] = self.scheduler.step(prediction, t, latents, **step_arguments, return_dict=False)[0]
                if on_step_end is not None:
                    seen = {name: tensors[name] for name in wanted}
                    tensors.update(checks.callback_result(on_step_end(self, i, t, seen)))
                if (i + 1) % order == 0 or i + 1 == len(steps):
                    bar.update()
        return tensors["latents"]

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels (B, 3, H, W) in [0, 1]."""
        vae = self.vae

        def run(dtype: torch.dtype) -> Tensor:
            scaled = latents.to(self.device, dtype) / vae.config.scaling_factor
            return vae.decode(scaled, return_dict=False)[0]  # type: ignore[no-any-return]

        return (finite("VAE decoder", vae, run) / 2 + 0.5).clamp(0, 1)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Is the UNet called with and without the prompt?"""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
