"""What a pipeline is besides its call: its components, where they are, loading and saving them, the progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from sdedit.adapters.ip_adapter import IPAdapterLoader
from sdedit.adapters.lora import LoraLoader
from sdedit.adapters.textual_inversion import TextualInversionLoader
from sdedit.config import later
from sdedit.inputs.image_prompts import ImagePrompts
from sdedit.inputs.text_prompts import TextPrompts
from sdedit.loading.folders import COMPONENTS
from sdedit.loading.pretrained import load_components, save_components
from sdedit.models.adapters import set_aside
from sdedit.models.offload import execution_device, refuse
from sdedit.options import Options

if TYPE_CHECKING:
    from sdedit.apps.composite import Composite
    from sdedit.apps.search import Found
    from sdedit.apps.sweep import Sweep


class Pipeline(LoraLoader, TextualInversionLoader, IPAdapterLoader, TextPrompts, ImagePrompts, Options):
    """The components of Stable Diffusion 1.x or 2.x, as one thing that can be loaded, moved and saved."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    image_encoder: Any
    load_report: Any = None

    def __init__(self, *, requires_safety_checker: bool, **components: Any) -> None:
        for name in COMPONENTS:
            setattr(self, name, components[name])
        self.requires_safety_checker = requires_safety_checker
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: `StableDiffusionImg2ImgPipeline(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def device(self) -> torch.device:
        """Where the UNet computes."""
        return execution_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return self.unet.dtype  # type: ignore[no-any-return]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast all networks, as `torch.nn.Module.to` does.

        Raises:
            ValueError: A device is given, and the networks are offloaded.
        """
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, int, torch.device, torch.Tensor))]
        if self._offload is not None and devices:
            raise ValueError("to: the networks are offloaded and come to the device by turns; remove_all_hooks() first")
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(*args, **kwargs)
        return self

    @property
    def interrupt(self) -> bool:
        """Was the running call cancelled?"""
        return self._interrupt

    def cancel(self) -> None:
        """Stop the running call after its current step, from a callback or another thread, and decode what there is."""
        self._interrupt = True

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for one of its latents, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments of tqdm for the progress bar, such as `disable=True`."""
        self._progress_bar_config = kwargs

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        with tqdm(total=total, **self._progress_bar_config) as bar:
            yield bar

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
                `revision`, `cache_dir`, `local_files_only`, `token`, `force_download` for the hub.

        Raises:
            FileNotFoundError: The model, or a file of it, is missing.
            ValueError: A file is damaged or does not fit, or the folder holds another kind of model.
        """
        return cls(
            **load_components(
                pretrained_model_name_or_path,
                torch_dtype=torch_dtype,
                variant=variant,
                use_safetensors=use_safetensors,
                **components_and_hub,
            )
        )

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

        parts = load_single_file(
            pretrained_model_link_or_path,
            torch_dtype=torch_dtype,
            config=config,
            original_config=original_config,
            prediction_type=prediction_type,
            image_size=image_size,
            extract_ema=extract_ema,
            **components_and_hub,
        )
        report = parts.pop("load_report")
        pipe = cls(**parts)
        pipe.load_report = report
        return pipe

    def save_single_file(self, path: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None) -> None:
        """Write UNet, VAE and text encoder to one `.safetensors` file that other programs read, too."""
        from sdedit.loading.single_file_save import save_single_file

        save_single_file(self, path, torch_dtype=torch_dtype)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write all components to a folder that `from_pretrained`, and other tools, read back.

        Adapters are left out, unless they are fused.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles; expected True (safetensors)")
        refuse("save_pretrained", self.unet)
        with set_aside(self.unet, self.text_encoder):
            save_components(self.components, self.requires_safety_checker, save_directory, variant)

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={type(v).__name__}" for k, v in self.components.items() if v is not None)
        return f"{type(self).__name__}({parts})"
