"""What a pipeline is besides its call: its components, where they are, loading and saving them, the progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from sdedit.adapters.loaders import Adapters
from sdedit.compat.idioms import Idioms, loading_arguments, placement
from sdedit.config import later
from sdedit.denoising import Calls
from sdedit.inputs import checks
from sdedit.inputs.image_prompts import encode_images, for_adapters
from sdedit.inputs.text_prompts import Reader, negative_embeds
from sdedit.loading.folders import COMPONENTS, class_name
from sdedit.loading.pretrained import load_components, save_components
from sdedit.models.adapters import set_aside, warn_of_unfused
from sdedit.models.ip_adapter import projections
from sdedit.models.offload import execution_device, refuse
from sdedit.options import Options

if TYPE_CHECKING:
    from sdedit.apps.composite import Composite
    from sdedit.apps.search import Found
    from sdedit.apps.sweep import Sweep


class Pipeline(Adapters, Options, Idioms):
    """The components of Stable Diffusion 1.x or 2.x, as one thing that can be loaded, moved and saved."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    safety_checker: Any
    feature_extractor: Any
    image_encoder: Any
    load_report: Any = None
    _vae_scale_factor: int | None = None  # a subclass's own
    _registered: Sequence[str] = ()  # names of a subclass's own parts

    def __init__(self, *, requires_safety_checker: bool = True, **components: Any) -> None:
        self._calls = Calls()
        for name in COMPONENTS:
            setattr(self, name, components.get(name))
        self.requires_safety_checker = requires_safety_checker
        self._progress_bar_config: dict[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: `StableDiffusionImg2ImgPipeline(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in dict.fromkeys([*COMPONENTS, *self._registered])}

    @property
    def device(self) -> torch.device:
        """Where the UNet computes."""
        return execution_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return self.unet.dtype  # type: ignore[no-any-return]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast all networks, as `torch.nn.Module.to` does; `torch_dtype` is another name of `dtype`.

        Raises:
            ValueError: A device is given, and the networks are offloaded.
        """
        args, kwargs = placement(args, kwargs)
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, int, torch.device, torch.Tensor))]
        if self._offload is not None and devices:
            raise ValueError("to: the networks are offloaded and come to the device by turns; remove_all_hooks() first")
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(*args, **kwargs)
        return self

    @property
    def scheduler(self) -> Any:
        """The scheduler; in a callback the copy of it that is set up for the running call."""
        here = self._calls.here
        return self._scheduler if here is None or here.scheduler is None else here.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @property
    def guidance_scale(self) -> float | list[float]:
        """Guidance scale of the call that runs in this thread, or of the last one, or those of its pictures."""
        return self._calls.seen.guidance.scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Is the UNet called with and without the prompt, in that call?"""
        return self._calls.seen.guidance.on

    @property
    def num_timesteps(self) -> int:
        """UNet calls of that call, for each of its repeats."""
        return self._calls.seen.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Was that call cancelled?"""
        return self._calls.seen.interrupt

    def cancel(self) -> None:
        """Stop after the current step and decode what there is: in a callback its call, elsewhere all that run."""
        self._calls.interrupt()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for one of its latents, along a side."""
        return self._vae_scale_factor or int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @vae_scale_factor.setter
    def vae_scale_factor(self, factor: int) -> None:
        self._vae_scale_factor = factor

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments of tqdm for the progress bar, such as `disable=True`."""
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A progress bar over things, or of so many steps, as `set_progress_bar_config` says."""
        return tqdm(iterable, total=total, **self._progress_bar_config)

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
        prompt_weighting: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts, or pass on embeds that were made before.

        Args:
            prompt, negative_prompt: Strings, or lists of them; a single negative prompt serves all prompts.
            num_images_per_prompt: Each is repeated that often.
            do_classifier_free_guidance: Without it there are no negative embeds.
            lora_scale: Strength of the text encoder's adapters.
            clip_skip: Leave out that many of the last layers (of the prompt; the negative one is read in full).
            prompt_weighting: Read weights and prompts of any length, see `sdedit.inputs.weighting`.

        Returns:
            Prompt embeds and negative prompt embeds, (B·num_images_per_prompt, M, C) each.
        """
        checks.either("prompt", prompt, "prompt_embeds", prompt_embeds)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            checks.either("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds)
        if clip_skip is not None:
            checks.whole_number("clip_skip", clip_skip, 0)
        texts = [] if prompt is None else checks.prompts("prompt", prompt)
        negative = checks.prompts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        reader = Reader(self.tokenizer, self.text_encoder, lora_scale, prompt_weighting)
        place, dtype = device or self.device, self.unet.dtype

        if prompt_embeds is None:
            # Prompt and negative prompt must have the same length; weighted ones may have any.
            prompt_embeds = reader.read(texts, clip_skip, reader.length([*texts, *negative]))
        embeds = checks.embeds("prompt_embeds", prompt_embeds, self.unet.config.cross_attention_dim).to(place, dtype)
        repeated = embeds.repeat_interleave(num_images_per_prompt, 0)
        if not do_classifier_free_guidance:
            return repeated, None
        others = negative_embeds(reader, negative, negative_prompt_embeds, like=embeds)
        return repeated, others.to(place, dtype).repeat_interleave(num_images_per_prompt, 0)

    @torch.no_grad()
    def encode_image(
        self,
        image: Any,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Show images to the image encoder.

        Args:
            image: An image or a list, as the pipeline takes them; or a tensor (N, 3, H, W) that is prepared for CLIP.
            device: Where the result shall be.
            num_images_per_prompt: Each is repeated that often.
            output_hidden_states: Give the hidden states before the last layer (N, M, C), as Plus adapters need them,
                instead of the embeds (N, C).

        Returns:
            Those of the images, and those that stand for no image.
        """
        found = encode_images(self.image_encoder, self.feature_extractor, image, bool(output_hidden_states))
        found = found.to(device or execution_device(self.image_encoder))
        positive, negative = found.repeat_interleave(num_images_per_prompt, dim=1)
        return positive, negative

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: list[Tensor] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """Encode images for the UNet, or check and repeat embeds that were made before by this function.

        Args:
            ip_adapter_image: One for each adapter, or for each a list; one image for one adapter.
            ip_adapter_image_embeds: Instead of images, for each adapter (B, images, C) or, for Plus, (B, images, M, C);
                with guidance the negative ones come first, in twice as many rows.
            device: Where the result shall be.
            num_images_per_prompt: The rows are repeated that often.
            do_classifier_free_guidance: Put negative embeds before the others.

        Returns:
            A tensor for each adapter, as the UNet takes them in `added_cond_kwargs={"image_embeds": …}`.
        """

        def encode(image: Any, hidden_states: bool) -> tuple[Tensor, Tensor]:
            return self.encode_image(image, device, 1, hidden_states)

        layers, guided = projections(self.unet), do_classifier_free_guidance
        prepared = for_adapters(ip_adapter_image, ip_adapter_image_embeds, layers, guided, encode)
        repeats = [(num_images_per_prompt, *[1] * (one.ndim - 1)) for one in prepared]
        halves = [one.chunk(2 if guided else 1) for one in prepared]
        place = device or execution_device(self.unet)
        return [torch.cat([h.repeat(r) for h in both]).to(place) for both, r in zip(halves, repeats, strict=True)]

    def sweep(
        self,
        image: Image,
        prompt: str,
        strengths: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Sweep:
        """Draw an image at several strengths in one batch, from the same noise: see `sdedit.apps.sweep`."""
        return later("sdedit.apps.sweep:sweep")(self, image, prompt, strengths, generator, **settings)

    def composite(
        self,
        background: Image,
        cutouts: Image | Sequence[Image],
        prompt: str,
        at: Any,
        scale: Any = 1.0,
        **options: Any,
    ) -> Composite:
        """Paste cut-outs into a picture and make them one with it: see `sdedit.apps.composite`."""
        return later("sdedit.apps.composite:composite")(self, background, cutouts, prompt, at, scale, **options)

    def search(self, image: Image, prompt: str, faithful: float = 0.9, **options: Any) -> Found:
        """Find the largest strength that is still faithful, or the one that somebody picks: see `apps.search`."""
        return later("sdedit.apps.search:search")(self, image, prompt, faithful, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **components_and_hub: Any,
    ) -> Self:
        """Load a pipeline from a model folder or a hub id; with no argument, the small model of the package.

        Args:
            pretrained_model_name_or_path: A folder with model_index.json, or an id such as
                `"stable-diffusion-v1-5/stable-diffusion-v1-5"`.
            torch_dtype: Dtype of all networks; float32 if not given.
            variant: Such as `"fp16"`; components that have no such file use their ordinary one.
            use_safetensors: `True` never reads pickles, `False` reads only them.
            **components_and_hub: A component by its name, or `None` to leave it out (`safety_checker=None`), and
                `revision`, `cache_dir`, `local_files_only`, `token`, `force_download` for the hub; `dtype` for
                `torch_dtype`; `device_map`, one device or "auto".

        Raises:
            FileNotFoundError: The model, or a file of it, is missing.
            ValueError: A file is damaged or does not fit, or the folder holds another kind of model.
        """
        given = dict(torch_dtype=torch_dtype, variant=variant, use_safetensors=use_safetensors, **components_and_hub)
        known, own, device = loading_arguments(cls, given)
        pipe = cls._made_of(load_components(pretrained_model_name_or_path, **known) | own)
        pipe._name_or_path = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        config: str | os.PathLike[str] | None = None,
        original_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        prediction_type: str | None = None,
        image_size: int | None = None,
        extract_ema: bool = False,
        **components_and_hub: Any,
    ) -> Self:
        """Load a pipeline from one file, as most models are shared; nothing else is downloaded.

        Args:
            pretrained_model_link_or_path: A `.safetensors`, `.ckpt` or `.pt` file of Stable Diffusion 1.x or 2.x, or
                its address on huggingface.co.
            torch_dtype: Dtype of all networks; float32 if not given.
            config: A model folder, or id, whose configs and tokenizer are used; else the file's shapes tell.
            original_config: The YAML file of its training, or what it holds; one beside the file is used, too.
            prediction_type: `"epsilon"` or `"v_prediction"`; guessed if not given.
            image_size: Side of the pictures that it was trained on, in pixels: 512, or 768 for v-prediction.
            extract_ema: Use the averaged weights of the UNet, if the file has them.
            **components_and_hub: A component by its name, instead of the file's, and `revision`, `cache_dir`,
                `local_files_only`, `token`, `force_download` for the hub.

        Returns:
            The pipeline; its `load_report` says what was matched and what was left out (`SingleFileReport`).

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: It is damaged, does not fit, or holds another kind of model.
        """
        from sdedit.loading.single_file import load_single_file

        known, own, device = loading_arguments(cls, {"torch_dtype": torch_dtype, **components_and_hub})
        parts = load_single_file(
            pretrained_model_link_or_path,
            config=config,
            original_config=original_config,
            prediction_type=prediction_type,
            image_size=image_size,
            extract_ema=extract_ema,
            **known,
        )
        report = parts.pop("load_report")
        pipe = cls._made_of(parts | own)
        pipe.load_report, pipe._name_or_path = report, str(pretrained_model_link_or_path)
        return pipe if device is None else pipe.to(device)

    def save_single_file(self, path: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None) -> None:
        """Write UNet, VAE and text encoder to one `.safetensors` file that other programs read, too."""
        from sdedit.loading.single_file_save import save_single_file

        save_single_file(self, path, torch_dtype=torch_dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write all components to a folder that `from_pretrained`, and other tools, read back.

        Adapters are left out, with a warning, unless they are fused. Each network is one file: `max_shard_size` is not
        used. A process that is killed leaves the model of before, this one, or a folder that does not load.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles; expected True (safetensors)")
        refuse("save_pretrained", self.unet)
        warn_of_unfused(self.unet, self.text_encoder)
        with set_aside(self.unet, self.text_encoder):
            save_components(self.components, self.requires_safety_checker, save_directory, variant)

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={class_name(v)}" for k, v in self.components.items() if v is not None)
        return f"{type(self).__name__}({parts})"
