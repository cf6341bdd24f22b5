"""The stages of the pipeline as pure functions, each compiled once for every shape: encode and noise, denoise, decode.

What changes from call to call (seed, prompt, guidance, the rows of the solver and how many of them run) is data, so
none of it compiles anything again. What is `static` below are networks and settings of theirs, which are hashed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sdedit.flax.layers import Array, timestep_embedding
from sdedit.flax.schedulers import Table, draw, row_at
from sdedit.schedulers import rows as row_functions

Arrays = Mapping[str, Any]

DEVICES = "devices"  # the axis of a mesh along which batches are split


def start(networks: tuple[Any, Any], params: Arrays, inputs: Arrays, table: Table) -> dict[str, Array]:
    """Read and encode image and prompts, and noise the latents to where the run begins.

    Args:
        networks: Text encoder and VAE.
        inputs: `prompt_ids`, `neg_prompt_ids` (B, M); `image` (B, 3, H, W) in [-1, 1]; `key`; perhaps `noise`.

    Returns:
        `latents` (B, C, h, w) in float32, and `context` (2·B, M, C'), the negative prompts first.
    """
    text_encoder, vae = networks
    ids = jnp.concatenate([inputs["neg_prompt_ids"], inputs["prompt_ids"]])
    context = text_encoder.apply({"params": params["text_encoder"]}, ids)[0]

    image, factor = inputs["image"], 2 ** (len(vae.block_out_channels) - 1)
    below, right = (-side % factor for side in image.shape[2:])
    image = jnp.pad(image, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
    posterior = vae.apply({"params": params["vae"]}, image, return_dict=False, method=vae.encode)[0]
    latents = vae.scaling_factor * posterior.sample(inputs["key"]).transpose(0, 3, 1, 2).astype(jnp.float32)

    noise = inputs.get("noise")
    if noise is None:  # from the same key as the sample: as diffusers draws it
        noise = jax.random.normal(inputs["key"], latents.shape)
    return {"latents": table.signal * latents + table.noise * noise, "context": context}


def denoise(
    networks: tuple[Any, tuple[float, float] | None], params: Arrays, inputs: Arrays, table: Table
) -> dict[str, Array]:
    """Noisy latents to clean ones: one UNet call and one row a timestep.

    Args:
        networks: The UNet, and dynamic thresholding (ratio, bound) or `None`.
        inputs: `latents` and `context`, as `start` gives them; `guidance` (B,); `key`.

    Returns:
        `latents` (B, C, h, w) in float32.
    """
    unet, threshold = networks
    latents, context, key = inputs["latents"], inputs["context"], inputs["key"]
    guidance = inputs["guidance"].reshape(-1, 1, 1, 1)
    # A model distilled with guidance is told of it, and runs without negative prompts.
    distilled, condition = unet.time_cond_proj_dim, None
    if distilled is not None:
        context = jnp.split(context, 2)[1]
        told = jnp.broadcast_to((guidance.reshape(-1) - 1) * 1000, latents.shape[:1])
        condition = timestep_embedding(told, distilled, flip_sin_to_cos=False, freq_shift=1)

    def body(i: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
        x, memory = carried
        row = row_at(table, i)
        seen = x * row.scale if distilled is not None else jnp.concatenate([x * row.scale] * 2)
        said = unet.apply({"params": params["unet"]}, seen, row.t, context, condition, return_dict=False)[0]
        prediction = said.astype(jnp.float32)
        if distilled is None:
            without, with_prompt = jnp.split(prediction, 2)
            prediction = without + guidance * (with_prompt - without)
        noise = draw(table, i, key, x.shape)
        x, _, _, memory = row_functions.step(row, x, prediction, memory, noise, threshold=threshold, xp=jnp)
        return x, memory

    memory = row_functions.blank_memory(latents, table.depth)
    return {"latents": jax.lax.fori_loop(0, table.count, body, (latents, memory))[0]}


def decode(networks: tuple[Any], params: Arrays, inputs: Arrays, table: Table) -> dict[str, Array]:
    """`latents` (B, C, h, w) to `images` (B, h·f, w·f, 3) in [0, 1], float32."""
    vae = networks[0]
    scaled = inputs["latents"] / vae.scaling_factor
    pixels = vae.apply({"params": params["vae"]}, scaled, return_dict=False, method=vae.decode)[0]
    return {"images": jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)}


Stage = Callable[..., dict[str, Array]]


@functools.cache
def compiled(stage: Stage, networks: tuple[Any, ...], mesh: Mesh | None = None) -> Callable[..., dict[str, Array]]:
    """A stage as `f(params, latents, inputs, table)`, under `jax.jit`; the buffer of `latents` is given up.

    Args:
        mesh: Inputs and params have a leading axis, of as many as there are devices in the mesh; each device gets its
            part, and runs as if it were alone.
    """

    def run(params: Arrays, latents: Arrays, inputs: Arrays, table: Table) -> dict[str, Array]:
        return stage(networks, params, {**inputs, **latents}, table)

    def run_one(params: Arrays, latents: Arrays, inputs: Arrays, table: Table) -> dict[str, Array]:
        params, latents, inputs = jax.tree.map(lambda x: x[0], (params, latents, inputs))
        return jax.tree.map(lambda x: x[None], run(params, latents, inputs, table))  # type: ignore[no-any-return]

    if mesh is None:
        return jax.jit(run, donate_argnums=1)
    split, whole = PartitionSpec(DEVICES), PartitionSpec()
    # Nothing is exchanged between devices, so there is nothing to check of how values vary over them.
    mapped = jax.shard_map(run_one, mesh=mesh, in_specs=(split, split, split, whole), out_specs=split, check_vma=False)
    return jax.jit(mapped, donate_argnums=1)
