"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020) without transformers, which takes seconds to import.

The pipeline's users get transformers' class. This one serves commands, which read a prompt and are done; parameter
names and results are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.attention import attention
from sdedit.models.model import Model
from sdedit.output import Output

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}

# A token sees those before it.
_causal = functools.partial(F.scaled_dot_product_attention, is_causal=True)


@dataclass
class CLIPTextOutput(Output):
    """`last_hidden_state` (B, M, C), after the final norm, and before it the inputs and outputs of all layers."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, core=_causal))


class _MLP(nn.Module):
    def __init__(self, dim: int, inner: int, act: str) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[act]
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int, act: str, eps: float) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.self_attn, self.mlp = _SelfAttention(dim, heads), _MLP(dim, inner, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEncoder(Model):
    """Token ids to hidden states; the arguments are the keys of a published `text_encoder/config.json`."""

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act={hidden_act!r}; expected one of {', '.join(_ACTIVATIONS)}")
        layer = (hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(vocab_size, hidden_size),
                "position_embedding": nn.Embedding(max_position_embeddings, hidden_size),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(*layer) for _ in range(num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(hidden_size, layer_norm_eps)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> CLIPTextOutput:
        """(B, M) token ids, M at most `max_position_embeddings`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"](positions)
        states = [x]
        for layer in cast("nn.ModuleList", self.encoder["layers"]):
            x = layer(x)
            states.append(x)
        return CLIPTextOutput(self.final_layer_norm(x), tuple(states) if output_hidden_states else None)
