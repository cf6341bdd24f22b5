"""What every network of the package has in common: a config, a dtype and a device, loading and saving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import torch

from sdedit.config import Configurable, later
from sdedit.models.kinds import check_values
from sdedit.models.options.attention import AttentionOptions
from sdedit.models.options.model import ModelOptions
from sdedit.models.options.processors import TakesProcessors


class Model(TakesProcessors, ModelOptions, AttentionOptions, Configurable):
    """A network whose constructor arguments are the keys of its `config.json`."""

    weights_name = "diffusion_pytorch_model"

    @classmethod
    def _check_values(cls, values: Mapping[str, Any]) -> None:
        check_values(values)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the dtype of the first floating-point parameter, unless that is only stored so."""
        return self.compute_dtype or next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **hub: Any,
    ) -> Self:
        """Load a network in evaluation mode from a folder or a hub id.

        Args:
            pretrained_model_name_or_path: A folder with `config.json` and weights, or a model id on the hub.
            subfolder: Folder inside it, such as `"unet"`.
            torch_dtype: Dtype of the parameters; float32 if not given.
            variant: Such as `"fp16"`, for `diffusion_pytorch_model.fp16.safetensors`.
            use_safetensors: `True` never reads pickles, `False` reads only pickles; safetensors first if not given.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`, as in huggingface_hub.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, or its names and shapes are not those of the network.
        """
        return later("sdedit.loading.pretrained:load_model")(  # type: ignore[no-any-return]
            cls,
            pretrained_model_name_or_path,
            subfolder=subfolder,
            torch_dtype=torch_dtype,
            variant=variant,
            use_safetensors=use_safetensors,
            **hub,
        )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        config: str | os.PathLike[str] | None = None,
        original_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        image_size: int | None = None,
        extract_ema: bool = False,
        **hub: Any,
    ) -> Self:
        """Load a UNet or a VAE in evaluation mode from a single file: a whole checkpoint, or one of the network alone.

        Args:
            pretrained_model_link_or_path: A `.safetensors`, `.ckpt` or `.pt` file, or its address on huggingface.co.
            torch_dtype: Dtype of the parameters; float32 if not given.
            config: A folder with the network's `config.json`, or a model folder; else the file's shapes tell.
            original_config: The YAML file of its training, or what it holds.
            image_size: Side of the pictures that it was trained on, in pixels.
            extract_ema: Use the averaged weights, if the file has them.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`, as in huggingface_hub.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: It is damaged, of another kind, or its names and shapes are not those of the network.
        """
        return later("sdedit.loading.single_file:load_network")(  # type: ignore[no-any-return]
            cls,
            pretrained_model_link_or_path,
            torch_dtype=torch_dtype,
            config=config,
            original_config=original_config,
            image_size=image_size,
            extract_ema=extract_ema,
            **hub,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write `config.json` and the weights, as one safetensors file, to a folder.

        Raises:
            ValueError: `safe_serialization=False`: pickles are read, never written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; expected True (safetensors)")
        # IP-Adapters are files of their own.
        theirs = ("encoder_hid_proj.", ".ip_adapters.")
        state = {name: t for name, t in self.state_dict().items() if not any(part in name for part in theirs)}
        save = later("sdedit.loading.weights:save_network")
        save(state, self.to_json_string(), save_directory, self.weights_name, variant)
