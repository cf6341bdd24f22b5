"""LoRA files made of random numbers, in every layout, and what tests ask of a pipeline that loads them."""

from __future__ import annotations

import hashlib
import warnings

import diffusers
import torch

from conftest import picture
from sdedit.models import adapters

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_MODULES = [
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn1.to_out.0",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q",
]
TEXT_MODULES = [f"encoder.layers.{i}.self_attn.{p}" for i in (0, 2) for p in ("q_proj", "out_proj")]
CONVS = ["down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"]


def lora(pipe, *, rank=4, seed=0, unet=UNET_MODULES, text=TEXT_MODULES, size=0.2):
    """Random factors by (component, module, part)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for component, modules in (("unet", unet), ("text_encoder", text)):
        every = adapters.adaptable(getattr(pipe, component))
        for module in modules:
            shape = every[module].weight.shape
            made[component, module, "down"] = torch.randn(rank, *shape[1:], generator=generator) * size
            up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
            made[component, module, "up"] = up * size
    return made


def as_diffusers(made):
    text = "text_encoder.text_model.{}.lora_linear_layer.{}.weight"
    return {(f"unet.{m}.lora.{p}.weight" if c == "unet" else text.format(m, p)): t for (c, m, p), t in made.items()}


def as_old_diffusers(made):
    attention = {k: t for k, t in made.items() if ".attn" in k[1]}
    return {
        f"unet.{m.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{p}.weight": t
        for (_, m, p), t in attention.items()
    }


def as_peft(made):
    part = {"down": "A", "up": "B"}
    return {f"{c}.{'text_model.' * (c != 'unet')}{m}.lora_{part[p]}.weight": t for (c, m, p), t in made.items()}


def as_kohya(made, alpha=None):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    state = {f"{prefix[c]}{m.replace('.', '_')}.lora_{p}.weight": t for (c, m, p), t in made.items()}
    if alpha is not None:
        state |= {
            name.replace("lora_down.weight", "alpha"): torch.tensor(alpha)
            for name in list(state)
            if "lora_down" in name
        }
    return state


def draw(pipe, seed=0, **more):
    arguments = {"strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    arguments["generator"] = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(pipe("apple cat", picture(64, 64), **arguments | more).images)


def fingerprint(pipe):
    """Names, bytes and trainability of all weights, and how many modules and hooks there are."""
    digest = hashlib.sha256()
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{parameter.requires_grad}{parameter.dtype}".encode())
            digest.update(parameter.detach().numpy().tobytes())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        digest.update(f"{[n for n, _ in model.named_modules()]}{hooks}{hasattr(model, 'peft_config')}".encode())
    return digest.hexdigest()


def load(pipe, path, **more):
    """diffusers' own warnings do not concern these tests; ours would fail them."""
    with warnings.catch_warnings():
        if isinstance(pipe, diffusers.DiffusionPipeline):
            warnings.simplefilter("ignore")
        return pipe.load_lora_weights(path, **more)


def same(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
