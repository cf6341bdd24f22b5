"""The way of a batch of images through JAX: read, encode and noise, denoise, decode; `__call__` in this order."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdedit.flax import stages
from sdedit.flax.base import FlaxPipeline, mesh_for
from sdedit.flax.model import Params
from sdedit.flax.schedulers import laid_out, make_table
from sdedit.inputs import checks, prompts
from sdedit.inputs.pixels import read_pixels
from sdedit.output import Output


@dataclass
class FlaxStableDiffusionPipelineOutput(Output):
    """What the pipeline returns.

    Attributes:
        images: (B, H, W, 3) float32 in [0, 1], or (devices, B / devices, H, W, 3) with `jit=True`.
        nsfw_content_detected: One bool an image, or `None` where no safety checker ran.
    """

    images: np.ndarray[Any, Any]
    nsfw_content_detected: list[bool] | None = None


class FlaxStableDiffusionImg2ImgPipeline(FlaxPipeline):
    """Image-to-image with Stable Diffusion 1.x and 2.x on JAX.

    Example:
        >>> from sdedit import FlaxStableDiffusionImg2ImgPipeline
        >>> pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained()
        >>> prompt_ids, image = pipe.prepare_inputs("red apple, 3d", doodle)
        >>> images = pipe(prompt_ids, image, params, jax.random.key(0), strength=0.65, guidance_scale=3.0).images

    Args:
        vae, text_encoder, unet: `FlaxAutoencoderKL`, `FlaxCLIPTextModel`, `FlaxUNet2DConditionModel`.
        tokenizer: CLIP's, from transformers.
        scheduler: Any of `sdedit.flax.schedulers`, or of `sdedit.schedulers`.
        safety_checker, feature_extractor: Both or neither; without them nothing is checked.
        dtype: What the networks compute in.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(
            dtype,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        if unet.in_channels != vae.latent_channels:
            raise ValueError(f"unet: takes {unet.in_channels} channels; expected the VAE's {vae.latent_channels}")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("feature_extractor: None, but the safety checker needs one; or pass safety_checker=None")

    def prepare_inputs(self, prompt: str | list[str], image: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Token ids (B, M) of prompts, and pixels (B, 3, H, W) in [-1, 1] of images, for the call.

        Args:
            prompt: One, or a list.
            image: PIL in any mode, NumPy, tensor, or a list of one kind, all of one size: see `read_pixels`.
        """
        return self.prepare_text_inputs(prompt), read_pixels(image, 3).pixels

    def prepare_text_inputs(self, prompt: str | list[str]) -> np.ndarray[Any, Any]:
        """Token ids (B, M) of prompts or negative prompts."""
        length = prompts.prompt_length(self.tokenizer, self.text_encoder)
        return prompts.tokenize(self.tokenizer, checks.prompts("prompt", prompt), length)

    def __call__(
        self,
        prompt_ids: Any,
        image: Any,
        params: Params,
        prng_seed: Any,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Any = 7.5,
        noise: Any = None,
        neg_prompt_ids: Any = None,
        return_dict: bool = True,
        jit: bool = False,
        eta: float = 0.0,
    ) -> FlaxStableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Turn images into pictures that follow the prompts.

        It compiles when shapes are new, never for another strength, seed, prompt, guidance or number of steps (up to
        the next multiple of 64). With several devices the batch is split over as many of them as divide it.

        Args:
            prompt_ids: (B, M), as `prepare_inputs` gives them; one prompt serves all images.
            image: (B, 3, H, W) in [-1, 1], any H and W; one image serves all prompts.
            params: As `from_pretrained` gives them; `place(params)` first, where there are several devices.
            prng_seed: `jax.random.key(seed)`, `jax.random.PRNGKey(seed)` or the seed, 0 to 2**64 - 1: the VAE's sample
                and the noise are both drawn from it, as in diffusers 0.34.
            strength: How far from the image the picture may go, 0 to 1: of `num_inference_steps`, the last
                `int(num_inference_steps * strength)` run. 0 gives the image through the VAE and back.
            num_inference_steps: Steps of the whole schedule, at least 1.
            height, width: If given, they must be those of the images.
            guidance_scale: Weight of the prompt against the negative prompt (arXiv 2207.12598); one for all, or (B,).
            noise: (B, C, H/f, W/f), standard normal, to be used instead of what the seed gives.
            neg_prompt_ids: (B, M) or (1, M), from `prepare_text_inputs`; those of the empty prompt if not given.
            return_dict: `False` for a tuple (images, nsfw_content_detected).
            jit: The old way: all arrays, the params and the seeds have a leading axis of as many as there are devices
                (`flax.jax_utils.replicate`, `flax.training.common_utils.shard`), and each device works on its own part.
            eta: Noise of DDIM and TCD, 0 to 1.

        Raises:
            ValueError: An argument is not as described; the message names it.
        """
        strength = checks.number("strength", strength, 0, 1)
        num_inference_steps = checks.whole_number("num_inference_steps", num_inference_steps, 1)
        eta = checks.number("eta", eta, 0, 1)

        # 1. Read: arrays of one batch, on the devices.
        inputs = _batch(self, prompt_ids, image, prng_seed, guidance_scale, noise, neg_prompt_ids, 1 if jit else 0)
        size = inputs["image"].shape[-2:]
        for name, value, side in (("height", height, size[0]), ("width", width, size[1])):
            if value not in (None, side):
                raise ValueError(f"{name}={value}; expected {side}, that of the images (resize them first)")
        mesh = mesh_for(len(inputs["prompt_ids"]))
        if not jit:
            inputs, params = _placed(inputs, params, mesh)

        # 2. Choose the rows of the solver that strength leaves.
        plan = laid_out(self.scheduler, num_inference_steps)
        left = int(num_inference_steps * strength)
        first = min((num_inference_steps - left) * plan.order, len(plan.times))
        options = {"eta": eta} if "eta" in inspect.signature(type(plan).solver).parameters else {}
        table = make_table(plan, first, **options)

        # 3. Encode image and prompts, noise the latents to where the run begins.
        where, networks = (mesh if jit else None), (self.text_encoder, self.vae)
        begun = stages.compiled(stages.start, networks, where)(_only(params, "text_encoder", "vae"), {}, inputs, table)

        # 4. Denoise: one UNet call and one row a timestep.
        step_inputs = {"context": begun["context"], "guidance": inputs["guidance"], "key": inputs["key"]}
        denoise = stages.compiled(stages.denoise, (self.unet, plan.threshold), where)
        latents = denoise(_only(params, "unet"), {"latents": begun["latents"]}, step_inputs, table)

        # 5. Decode, and cut off what was padded.
        decoded = stages.compiled(stages.decode, (self.vae,), where)(_only(params, "vae"), {}, latents, table)
        images = np.asarray(decoded["images"][..., : size[0], : size[1], :])
        images, flags = self._check_safety(images, params, jit)
        return FlaxStableDiffusionPipelineOutput(images, flags) if return_dict else (images, flags)

    def _check_safety(
        self, images: np.ndarray[Any, Any], params: Params, jit: bool
    ) -> tuple[np.ndarray[Any, Any], list[bool] | None]:
        """Images with those made black that the safety checker flags, and the flags."""
        if self.safety_checker is None:
            return images, None
        pictures = self.numpy_to_pil(images)
        seen = self.feature_extractor(pictures, return_tensors="np").pixel_values
        own = params["safety_checker"]
        own = jax.tree.map(lambda x: x[0], own) if jit else own
        flags = [bool(flag) for flag in np.asarray(_flag(self.safety_checker, own, jnp.asarray(seen)))]
        if any(flags):
            warnings.warn(
                f"the safety checker flagged {sum(flags)} of {len(flags)} pictures and made them black; "
                "safety_checker=None in from_pretrained turns it off",
                stacklevel=3,
            )
        keep = ~np.array(flags).reshape(*images.shape[:-3], 1, 1, 1)
        return images * keep, flags


@jax.jit(static_argnums=0)
def _flag(checker: Any, params: Params, seen: Any) -> Any:
    return checker.apply({"params": params}, seen)


def _only(params: Params, *names: str) -> Params:
    return {name: params[name] for name in names}


def _batch(
    pipe: FlaxStableDiffusionImg2ImgPipeline,
    prompt_ids: Any,
    image: Any,
    prng_seed: Any,
    guidance_scale: Any,
    noise: Any,
    neg_prompt_ids: Any,
    leading: int,
) -> dict[str, Any]:
    """Everything of one batch, in the same order and of the same length; `leading` axes of devices come first."""
    ids, pixels = np.asarray(prompt_ids), image
    if ids.ndim != 2 + leading:
        raise ValueError(f"prompt_ids: shape {list(ids.shape)}; expected {'(devices, B, M)' if leading else '(B, M)'}")
    if pixels.ndim != 4 + leading or pixels.shape[-3] != 3:
        expected = "(devices, B, 3, H, W)" if leading else "(B, 3, H, W)"
        raise ValueError(f"image: shape {list(pixels.shape)}; expected {expected}, as prepare_inputs gives")
    negative = pipe.prepare_text_inputs("") if neg_prompt_ids is None else np.asarray(neg_prompt_ids)
    batch = max(ids.shape[leading], pixels.shape[leading])
    front = (*ids.shape[:leading], batch)

    def spread(name: str, array: Any, axes: int) -> Any:
        """One for each image, of what is one for all."""
        xp = jnp if isinstance(array, jax.Array) else np  # NumPy compiles nothing
        try:
            return xp.broadcast_to(array, (*front, *array.shape[array.ndim - axes :]))
        except ValueError as error:
            raise ValueError(f"{name}: shape {list(array.shape)} for a batch of {list(front)}") from error

    made = {
        "prompt_ids": spread("prompt_ids", ids, 1),
        "neg_prompt_ids": spread("neg_prompt_ids", negative, 1),
        "image": spread("image", pixels.astype(np.float32), 3),
        "guidance": spread("guidance_scale", np.asarray(guidance_scale, np.float32), 0),
        "key": _key(prng_seed),
    }
    if noise is not None:
        factor = pipe.vae_scale_factor
        shape = (*front, pipe.unet.in_channels, *(-(-side // factor) for side in pixels.shape[-2:]))
        if noise.shape != shape:
            raise ValueError(f"noise: shape {list(noise.shape)}; expected {list(shape)}")
        made["noise"] = jnp.asarray(noise, jnp.float32)
    return made


def _key(prng_seed: Any) -> Any:
    """The key of a whole number, whatever library's, or of what is a key already.

    JAX itself keeps 32 bits of a seed; those above them are folded in, so that no two seeds are the same.
    """
    if isinstance(prng_seed, (bool, float, str)) or prng_seed is None:
        raise TypeError(f"prng_seed={prng_seed!r}; expected jax.random.key(seed), or a whole number")
    if not isinstance(prng_seed, (int, np.integer)):
        return jnp.asarray(prng_seed)
    seed = int(prng_seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"prng_seed={seed}; expected a whole number from 0 to 2**64 - 1")
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def _placed(inputs: dict[str, Any], params: Params, mesh: Any) -> tuple[dict[str, Any], Params]:
    """Inputs split over the devices of a mesh, params on all of them; nothing is copied that is there already."""
    split, whole = NamedSharding(mesh, PartitionSpec(stages.DEVICES)), NamedSharding(mesh, PartitionSpec())
    placed = {name: jax.device_put(x, whole if name == "key" else split) for name, x in inputs.items()}
    return placed, jax.device_put(_only(params, *(set(params) - {"scheduler"})), whole)
