"""What every Flax network of the package has in common: a config, loading and saving; parameters are nested dicts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdedit.config import Config, config_text
from sdedit.files import read_json, write_folder
from sdedit.flax import convert
from sdedit.loading.folders import explained
from sdedit.loading.hub import find_folder
from sdedit.models.kinds import check_values

Params = dict[str, Any]


class FlaxModel(nn.Module):
    """A network whose fields, but for `dtype`, are the keys of its `config.json`.

    `model.apply({"params": params}, …)` runs it. `dtype` is what it computes in.
    """

    config_name: ClassVar[str] = "config.json"
    weights_name: ClassVar[str] = "diffusion_flax_model.msgpack"
    layout: ClassVar[convert.Layout] = convert.UNET

    @property
    def config(self) -> Config:
        """The fields, as `config.json` has them."""
        fields = (f.name for f in dataclasses.fields(self) if f.name not in ("dtype", "parent", "name"))
        return Config({"_class_name": type(self).__name__, **{name: getattr(self, name) for name in fields}})

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str], **overrides: Any) -> Self:
        """Make a network from a config: a mapping, a `config.json`, or its folder. Unknown keys are not used."""
        if not isinstance(config, Mapping):
            path = Path(config)
            config = read_json(path / cls.config_name if path.is_dir() else path)
        check_values(config)
        cls._check(config)
        known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
        if wrong := sorted(set(overrides) - known):
            raise TypeError(f"{cls.__name__} has no option {', '.join(wrong)}; it has {', '.join(sorted(known))}")
        values: dict[str, Any] = {k: v for k, v in config.items() if k in known - {"dtype"}} | overrides
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    @classmethod
    def _check(cls, config: Mapping[str, Any]) -> None:
        """Refuse the config of another kind of model."""

    def example(self) -> tuple[Any, ...]:
        """Arguments of the smallest call, which tell the shapes of all parameters."""
        raise NotImplementedError

    def init_weights(self, rng: jax.Array) -> Params:
        """Random parameters."""
        return self.init(rng, *self.example())["params"]  # type: ignore[no-any-return]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by their path, with `/` between its parts; nothing is computed."""
        tree = jax.eval_shape(self.init_weights, jax.random.key(0))
        return {name: leaf.shape for name, leaf in convert.flatten(tree).items()}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        dtype: Any = jnp.float32,
        from_pt: bool | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **hub: Any,
    ) -> tuple[Self, Params]:
        """Load a network and its parameters from a folder or a hub id.

        Args:
            pretrained_model_name_or_path: A folder with `config.json` and weights, or a model id on the hub.
            subfolder: Folder inside it, such as `"unet"`.
            dtype: What it computes in, and the dtype of the parameters.
            from_pt: `True` reads PyTorch's weights, `False` the msgpack file; the latter if it is there when not given.
            variant, use_safetensors: Which of PyTorch's weights; those that are pickles need torch.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`, as in huggingface_hub.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, or its names and shapes are not those of the network.
        """
        root = find_folder(
            pretrained_model_name_or_path,
            components=[subfolder or ""],
            variant=variant,
            use_safetensors=use_safetensors,
            **hub,
        )
        folder = root / subfolder if subfolder else root
        config = read_json(folder / cls.config_name)
        with explained(folder / cls.config_name, cls):
            model = cls.from_config(config, dtype=jnp.dtype(dtype))
            expected = model.shapes()
        which = (variant, use_safetensors)
        return model, convert.load(folder, cls.weights_name, cls.layout, expected, dtype, from_pt, which)

    def save_pretrained(self, save_directory: str | os.PathLike[str], params: Params) -> None:
        """Write `config.json` and the parameters, as msgpack, to a folder."""
        with write_folder(save_directory) as folder:
            convert.save(params, folder / self.weights_name)
            (folder / self.config_name).write_text(config_text(self.config, type(self).__name__))

    def to_bf16(self, params: Params) -> Params:
        """Parameters in bfloat16."""
        return _cast(params, jnp.bfloat16)

    def to_fp16(self, params: Params) -> Params:
        """Parameters in float16."""
        return _cast(params, jnp.float16)

    def to_fp32(self, params: Params) -> Params:
        """Parameters in float32."""
        return _cast(params, jnp.float32)


def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
