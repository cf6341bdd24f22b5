"""LoRA files and textual inversions, merged into params, through the readers that the PyTorch pipeline has.

`FlaxPipeline` inherits these methods. Params are never changed: new ones are given back, which share what is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdedit.adapters import arrays, embedding_files
from sdedit.adapters.embedding_files import EmbeddingReport
from sdedit.adapters.files import Source, read_adapter
from sdedit.adapters.formats import Change, LoadReport, parse
from sdedit.adapters.kinds import factors
from sdedit.flax import convert
from sdedit.loading.headers import read_header

_TABLE = "text_model/embeddings/token_embedding/embedding"
_COMPONENTS = ("unet", "text_encoder")


class FlaxAdapters:
    """The part of a pipeline that merges adapters into params."""

    tokenizer: Any
    text_encoder: Any
    unet: Any

    def load_lora_weights(
        self,
        params: Mapping[str, Any],
        pretrained_model_name_or_path_or_dict: Source,
        *,
        scale: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
        strict: bool = True,
        **hub: Any,
    ) -> tuple[dict[str, Any], LoadReport]:
        """Merge a LoRA, LoCon, LoHa, LoKr or DoRA in any layout into params.

        Args:
            params: As `from_pretrained` gives them; they stay as they are.
            pretrained_model_name_or_path_or_dict: A file, a folder, a hub id, or arrays by name.
            scale: How much of it.
            weight_name, subfolder: Which file of the folder.
            strict: Refuse a file with names that are not understood; `False` merges the rest.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

        Returns:
            New params, and what matched and what did not. Words for the prompt that such a file brings are left out.

        Raises:
            ValueError: It does not fit, or is for another kind of model.
            ImportError: It is a pickle, and torch is not there.
        """
        file = read_adapter(pretrained_model_name_or_path_or_dict, _read_file, weight_name, subfolder, **hub)
        leaves = {name: convert.flatten(params[name]) for name in _COMPONENTS}
        weights = {name: _modules(held) for name, held in leaves.items()}
        parsed = parse(
            file.state,
            {
                name: {part: _torch_shape(held[path]) for part, path in weights[name].items()}
                for name, held in leaves.items()
            },
            source=file.source,
            text_width=self.unet.cross_attention_dim,
            metadata=file.metadata,
            peft_config=file.peft_config,
            strict=strict,
        )
        if parsed.report.problem:
            raise ValueError(f"{parsed.report.source} cannot be loaded: {parsed.report.problem}")
        merged = dict(params)
        for component, changes in parsed.changes.items():
            changed = dict(leaves[component])
            for module, change in changes.items():
                path = weights[component][module]
                if not all(arrays.is_finite(array) for array in change.roles.values()):
                    raise ValueError(f"{file.source} cannot be loaded: {component} {module} holds NaN or infinity")
                changed |= _merge(changed, path, change, scale)
            merged[component] = convert.unflatten(changed)
        return merged, parsed.report

    def load_textual_inversion(
        self,
        params: Mapping[str, Any],
        pretrained_model_name_or_path: embedding_files.Source | Sequence[embedding_files.Source],
        token: str | Sequence[str | None] | None = None,
        **where: Any,
    ) -> tuple[dict[str, Any], list[EmbeddingReport]]:
        """Give tokenizer and text encoder new words; as its table grows, the next call compiles the encoder anew.

        Args:
            params: As `from_pretrained` gives them; they stay as they are.
            pretrained_model_name_or_path: One or a list of: a file (diffusers', AUTOMATIC1111's or kohya's), a folder
                or hub id, what such a file holds, or an array (width,) or (n, width).
            token: The word for the prompt, or one for each embedding; the file's own if not given.
            **where: `weight_name`, `subfolder`, `use_safetensors`, and the hub's arguments.

        Returns:
            New params, and for each embedding its token and its number of vectors.

        Raises:
            ValueError: A file is damaged or of another kind, a token is taken, or the width is another model's.
            ImportError: It is a pickle, and torch is not there.
        """
        found = embedding_files.read_embeddings(pretrained_model_name_or_path, token, _read_nested, **where)
        leaves = convert.flatten(params["text_encoder"])
        table, room = leaves[_TABLE], self.text_encoder.max_position_embeddings - 2
        embedding_files.check_embeddings(found, self.tokenizer, table.shape, room)
        names = [n for one in found for n in embedding_files.tokens_of(str(one.token), len(one.vectors))]
        first = len(self.tokenizer)
        rows = [jnp.asarray(arrays.wide(one.vectors), table.dtype) for one in found]
        self.tokenizer.add_tokens(names)
        leaves[_TABLE] = jnp.concatenate([table[:first], *rows, table[first:]])
        self.text_encoder = self.text_encoder.clone(vocab_size=len(leaves[_TABLE]))
        reports = [EmbeddingReport(str(one.token), len(one.vectors), one.left_out) for one in found]
        return {**params, "text_encoder": convert.unflatten(leaves)}, reports


def _read_file(path: Path) -> dict[str, Any]:
    return convert.read_arrays(path, read_header(path).tensors)


def _read_nested(path: Path, stand_ins: Sequence[tuple[type, str]]) -> Any:
    """What a file of textual inversion holds; only pickles need torch."""
    if read_header(path, frozenset(name for _, name in stand_ins)).kind == "safetensors":
        return _read_file(path)
    try:
        from sdedit.adapters.nested import read_nested
    except ImportError as error:
        raise convert.needs_torch(path) from error
    return read_nested(path, stand_ins)


def _modules(leaves: Mapping[str, Any]) -> dict[str, str]:
    """For each layer with a weight, by the name that PyTorch has for it, the weight's path."""
    return {
        convert.torch_name(path.rpartition("/")[0]): path
        for path in leaves
        if re.search(r"/(kernel|embedding|scale)$", path)
    }


def _torch_shape(leaf: Any) -> tuple[int, ...]:
    return {4: lambda s: (s[3], s[2], s[0], s[1]), 2: lambda s: s[::-1]}.get(leaf.ndim, lambda s: s)(tuple(leaf.shape))


def _merge(leaves: Mapping[str, Any], path: str, change: Change, scale: float) -> dict[str, Any]:
    """The weight with the change in it, and the bias if that changes, by path; computed in float32."""
    held = leaves[path]
    own = np.asarray(held, dtype=np.float32)
    own = own.transpose(3, 2, 0, 1) if own.ndim == 4 else own.T
    part = factors(change.roles, own.shape, change.alpha, own, change.rank)
    moved = own + scale * np.asarray(arrays.wide(part.delta()))
    if part.magnitude is not None:  # DoRA: rows of the length that was learned, arXiv 2402.09353
        lengths = np.sqrt((moved.reshape(len(moved), -1) ** 2).sum(axis=1))
        ratio = np.asarray(arrays.wide(part.magnitude)) / lengths
        moved = moved * ratio.reshape(-1, *(1 for _ in moved.shape[1:]))
    made = {path: jnp.asarray(moved.transpose(2, 3, 1, 0) if moved.ndim == 4 else moved.T, held.dtype)}
    if part.bias is not None:
        bias = path.replace("/kernel", "/bias")
        if bias not in leaves:
            raise ValueError(f"{path}: the adapter has a bias for a layer that has none")
        added = np.asarray(leaves[bias], np.float32) + scale * np.asarray(arrays.wide(part.bias))
        made[bias] = jnp.asarray(added, leaves[bias].dtype)
    return made
