"""IP-Adapters from files: read, compared with the UNet and the image encoder, and only then attached.

A file is a pickle of two dicts, `image_proj` and `ip_adapter`, or safetensors with these as prefixes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdedit.adapters.nested import is_plain, read_nested
from sdedit.files import is_temporary
from sdedit.loading.families import FAMILY_OF_WIDTH
from sdedit.loading.headers import differences
from sdedit.loading.hub import find_file, find_folder
from sdedit.loading.pretrained import load_component
from sdedit.models import ip_adapter
from sdedit.models.blank import blank

Source = str | os.PathLike[str] | Mapping[str, Any]

_ENCODER = "CLIPVisionModelWithProjection"


@dataclass(frozen=True)
class IPAdapterReport:
    """What loading one IP-Adapter did.

    Attributes:
        kind: "base", "Plus" or "full-face".
        tokens: Tokens that an image becomes; `None`: one for each hidden state of the image encoder.
        layers: How many layers of the UNet attend to them.
    """

    kind: str
    tokens: int | None
    layers: int


class IPAdapterLoader:
    """The part of a pipeline that lets a picture be a second prompt."""

    unet: Any
    image_encoder: Any
    feature_extractor: Any
    _brought: tuple[str, ...] = ()  # components that came with an adapter and go with it

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source | Sequence[Source],
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str | None] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        **hub: Any,
    ) -> list[IPAdapterReport]:
        """Load one IP-Adapter for Stable Diffusion 1.5 (base, Plus or full-face), or several, in place of those before.

        Args:
            pretrained_model_name_or_path_or_dict: One or a list of: a file, a folder or hub id such as
                `"h94/IP-Adapter"`, or what such a file holds. One folder goes with several names.
            subfolder: Folder inside the folder or repository, such as `"models"`.
            weight_name: The file's name there, such as `"ip-adapter_sd15.safetensors"`.
            image_encoder_folder: Where the image encoder is, beside the file, or from the top if the name has a "/".
                It is loaded if the pipeline has none; `None` leaves it out: then only embeds can be given.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

        Returns:
            For each adapter its kind, its number of tokens and of layers.

        Raises:
            FileNotFoundError: There is no such file, or no image encoder.
            ValueError: A file is damaged, of another kind, or for another model. The pipeline is then as it was.
        """
        sources = _listed(pretrained_model_name_or_path_or_dict, weight_name, subfolder)
        adapters, folder = [], None
        for source, its_subfolder, name in sources:
            if isinstance(source, Mapping):
                state: Any = source
                where = "the adapter given"
            else:
                file = find_file(source, _names(source, its_subfolder, name), subfolder=its_subfolder, **hub)
                where = str(file)
                state = read_nested(file)
                folder = folder or _encoder_folder(source, its_subfolder, image_encoder_folder)
            adapters.append(_make(_flat(state, where), where, self.unet))
        parts = self._vision_parts(adapters, folder if image_encoder_folder else None, image_encoder_folder, hub)

        for name, part in parts.items():
            setattr(self, name, part)
        self._brought = (*self._brought, *parts)
        ip_adapter.replace_adapters(self.unet, adapters)
        layers = len(ip_adapter.cross_attentions(self.unet))
        return [IPAdapterReport(part.kind, part.tokens, layers) for part in ip_adapter.projections(self.unet)]

    def set_ip_adapter_scale(self, scale: float | dict[str, Any] | list[float | dict[str, Any]]) -> None:
        """Say how much images weigh beside the text: 1 as trained, 0 not at all.

        Args:
            scale: For all adapters, or a list with one for each. A number, or numbers for blocks, the others being 0:
                `{"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": 1.0}`.

        Raises:
            ValueError: No adapter is loaded, or there is no such block.
        """
        count = len(ip_adapter.projections(self.unet))
        scales = scale if isinstance(scale, list) else [scale] * count
        if not count or len(scales) != count:
            raise ValueError(f"scale: {len(scales)} for {count} IP-Adapters; expected one, or as many as are loaded")
        ip_adapter.set_scales(self.unet, scales)

    def unload_ip_adapter(self) -> None:
        """Take the adapters away, and what came with them: the image encoder and its image processor."""
        ip_adapter.replace_adapters(self.unet, [])
        for name in self._brought:
            setattr(self, name, None)
        self._brought = ()

    def _vision_parts(
        self, adapters: Sequence[Any], folder: tuple[Any, str] | None, name: str | None, hub: dict[str, Any]
    ) -> dict[str, Any]:
        """The image encoder and the image processor, as far as the pipeline lacks them and they are wanted."""
        import transformers

        parts: dict[str, Any] = {}
        encoder = self.image_encoder
        if encoder is not None:
            _check_encoder(adapters, encoder.config, "the pipeline's image encoder")
        elif folder is not None:
            root, inside = folder
            path = find_folder(root, components=[inside], **hub) / inside
            if not (path / "config.json").is_file():
                raise FileNotFoundError(
                    f"{path} has no image encoder: say where it is with image_encoder_folder; None does without"
                )
            _check_encoder(adapters, transformers.CLIPVisionConfig.from_pretrained(path), str(path))
            encoder = load_component("image_encoder", _ENCODER, path, torch_dtype=self.unet.dtype)
            parts["image_encoder"] = encoder.to(self.unet.device)
        elif name is not None:
            raise ValueError(
                "a dict has no image encoder beside it: give the pipeline one (image_encoder=…), or pass "
                "image_encoder_folder=None and only use ip_adapter_image_embeds"
            )
        if self.feature_extractor is None:
            side = 224 if encoder is None else encoder.config.image_size
            # The other becomes this one, with a message, where torchvision is absent.
            cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
            parts["feature_extractor"] = cls(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return parts


def _listed(source: Any, weight_name: Any, subfolder: Any) -> list[tuple[Any, str | None, str | None]]:
    """Source, subfolder and name of each adapter; a single one goes with all others."""
    lists = [list(v) if isinstance(v, (list, tuple)) else [v] for v in (source, subfolder, weight_name)]
    count = max(map(len, lists))
    if wrong := [len(v) for v in lists if len(v) not in (1, count)]:
        raise ValueError(f"load_ip_adapter: lists of {wrong[0]} and of {count}; expected lists of one length")
    return list(zip(*(v * count if len(v) == 1 else v for v in lists), strict=True))


def _names(source: Any, subfolder: str | None, name: str | None) -> list[str]:
    """The file's name: the one given, or the only weights in the folder, or the usual one of a repository."""
    folder = Path(source, subfolder or "")
    if name is not None or not folder.is_dir():
        return [name] if name else ["ip-adapter_sd15.safetensors", "ip-adapter_sd15.bin"]
    files = (p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    found = sorted(p.name for p in files if not is_temporary(p.name))
    if len(found) != 1:
        raise ValueError(f"{folder} has {', '.join(found) or 'no adapter'}: say which file with weight_name=")
    return found


def _encoder_folder(source: Any, subfolder: str | None, encoder: str | None) -> tuple[Any, str] | None:
    """Where the image encoder is: in what folder or repository, and where in there."""
    if encoder is None:
        return None
    if Path(source).is_file():
        return Path(source).parent, encoder
    return source, encoder if "/" in encoder or not subfolder else f"{subfolder}/{encoder}"


def read_ip_adapter(path: Path, unet: Any) -> ip_adapter.IPAdapter:
    """The adapter in a file, made for a UNet and not put into it.

    Raises:
        ValueError: It is damaged, of another kind, or for another model.
    """
    return _make(_flat(read_nested(path), str(path)), str(path), unet)


def _flat(state: Any, where: str) -> dict[str, Tensor]:
    """Tensors by their names with the prefixes `image_proj.` and `ip_adapter.`."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} holds a {type(state).__name__}; expected an IP-Adapter")
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    for part in ("image_proj.", "ip_adapter."):
        if not any(str(name).startswith(part) for name in flat):
            shown = ", ".join(map(repr, list(flat)[:3])) or "nothing"
            raise ValueError(f"{where} is no IP-Adapter: it has no names that begin with {part!r}, but {shown}, …")
    for name, value in flat.items():
        if not is_plain(value) or not value.is_floating_point():
            raise ValueError(f"{where}: {name} is no tensor of floats; expected an IP-Adapter")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{where}: {name} has fewer values than its shape {list(value.shape)} says")
    return flat


def _make(state: dict[str, Tensor], where: str, unet: Any) -> ip_adapter.IPAdapter:
    """An adapter for this UNet, on its device and in its dtype.

    Raises:
        ValueError: It is of another kind or for another model, or names or shapes differ; all of them are listed.
    """
    shapes = {name: value.shape for name, value in state.items()}
    proj = {name.removeprefix("image_proj."): s for name, s in shapes.items() if name.startswith("image_proj.")}
    width = unet.config.cross_attention_dim
    its_width = next((s[-1] for name, s in shapes.items() if name.endswith(".to_k_ip.weight")), None)
    if any(n.startswith("perceiver_resampler.") or n == "norm.weight" for n in proj) and "proj.weight" not in proj:
        raise ValueError(f"{where} is a FaceID adapter; expected IP-Adapter base, Plus or full-face for SD 1.5")
    if its_width is not None and its_width != width:
        family, ours = (f" ({FAMILY_OF_WIDTH[w]})" if w in FAMILY_OF_WIDTH else "" for w in (its_width, width))
        raise ValueError(f"{where} is for text that is {its_width} wide{family}; this UNet's is {width}{ours}")
    kinds: dict[str, Any] = {
        "proj.weight": ip_adapter.ImageProjection,
        "proj.3.weight": ip_adapter.FullImageProjection,
        "latents": ip_adapter.Resampler,
    }
    kind = next((kinds[name] for name in kinds if name in proj), None)
    if kind is None:
        raise ValueError(f"{where} is an IP-Adapter of an unknown kind; expected base, Plus or full-face for SD 1.5")
    layers = {str(2 * i + 1): layer for i, layer in enumerate(ip_adapter.cross_attentions(unet).values())}
    try:
        with blank():
            adapter = ip_adapter.IPAdapter(kind(proj), layers, width)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: the {kind.kind} image_proj is incomplete or damaged ({error})") from error
    expected = {name: value.shape for name, value in adapter.state_dict().items()}
    if shown := differences(expected, shapes):
        raise ValueError(f"{where} does not fit this UNet as an IP-Adapter {kind.kind}:\n{shown}")
    adapter.load_state_dict(state, assign=True)
    return adapter.to(unet.device, unet.dtype).requires_grad_(False).eval()


def _check_encoder(adapters: Sequence[Any], config: Any, where: str) -> None:
    """Compare the width that adapters expect of image features with the encoder's."""
    for adapter in adapters:
        part = adapter.image_proj
        gives = config.hidden_size if part.takes_hidden_states else config.projection_dim
        if gives != part.features:
            raise ValueError(
                f"{where} gives features {gives} wide, but the {part.kind} adapter takes {part.features}: "
                "it belongs to another image encoder"
            )
