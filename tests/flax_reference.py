"""What the last Flax pipeline of diffusers, 0.34.0, draws: a small model from NumPy's random numbers, and its pictures.

`python tests/flax_reference.py` writes `flax_reference.npz`, in an environment of its own with

    pip install diffusers==0.34.0 jax==0.4.35 jaxlib==0.4.35 flax==0.10.2 transformers==4.49.0

The test reads the file and needs none of that.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".npz")

UNET = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
)
VAE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    sample_size=16,
)
TEXT = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": dict(SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    "PNDMScheduler": dict(SCHEDULE, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True),
    "DPMSolverMultistepScheduler": dict(SCHEDULE),
}
SETTINGS = dict(strength=0.7, num_inference_steps=10, guidance_scale=4.0)
SEED = 11


def numbers(path: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The parameter of that path, which its name alone decides."""
    drawn = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    if path.endswith("scale"):
        return 1 + 0.1 * drawn
    if path.endswith("kernel"):
        return drawn / np.sqrt(np.prod(shape[:-1])).astype(np.float32)
    return 0.1 * drawn


def inputs() -> tuple[np.ndarray[Any, Any], ...]:
    """Token ids of prompt and negative prompt, and pixels."""
    rng = np.random.default_rng(0)
    ids, negative = rng.integers(0, 99, (2, 1, 77))
    return ids, negative, rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)


def main() -> None:
    import diffusers
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict
    from transformers import CLIPTextConfig, FlaxCLIPTextModel

    unet, vae = diffusers.FlaxUNet2DConditionModel(**UNET), diffusers.FlaxAutoencoderKL(**VAE)
    text = FlaxCLIPTextModel(CLIPTextConfig(**TEXT))
    params = {"unet": unet.init_weights(jax.random.PRNGKey(0)), "vae": vae.init_weights(jax.random.PRNGKey(0))}
    params["text_encoder"] = text.params

    def fill(tree: Any) -> Any:
        flat = flatten_dict(tree, sep="/")
        return unflatten_dict({path: numbers(path, leaf.shape) for path, leaf in flat.items()}, sep="/")

    params = {name: fill(tree) for name, tree in params.items()}
    ids, negative, pixels = inputs()
    pictures = {}
    for name, config in SCHEDULERS.items():
        scheduler = getattr(diffusers, f"Flax{name}")(**config)
        pipe = diffusers.FlaxStableDiffusionImg2ImgPipeline(vae, text, None, unet, scheduler, None, None)
        params["scheduler"] = scheduler.create_state()
        drawn = pipe(
            ids, pixels, params, jax.random.PRNGKey(SEED), height=16, width=16, neg_prompt_ids=negative, **SETTINGS
        )
        pictures[name] = np.asarray(drawn.images, dtype=np.float32)
    np.savez_compressed(FILE, **pictures)


if __name__ == "__main__":
    main()
