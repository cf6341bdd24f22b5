"""Run in a process of its own with 8 simulated devices: pictures are those of one, by the new way and the old."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdedit import FlaxStableDiffusionImg2ImgPipeline
from sdedit.flax import pipeline as module

jax.config.update("jax_disable_most_optimizations", True)


def main(folder: str) -> None:
    assert jax.device_count() == 8
    pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (8, 3, 16, 16)).astype(np.float32)
    ids = pipe.prepare_text_inputs(["a cat", "an apple"] * 4)
    settings = {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 3.0}

    # The new way: the batch is split over all devices, the params are on each of them.
    placed = pipe.place(params)
    assert len(placed["unet"]["conv_in"]["kernel"].sharding.device_set) == 8
    split = pipe(ids, images, placed, jax.random.key(1), **settings).images

    # The old way: everything has an axis of devices, and each device draws from a key of its own.
    replicated = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), params)
    keys = jax.random.split(jax.random.key(2), 8)
    old = pipe(ids[:, None], images[:, None], replicated, keys, jit=True, **settings).images
    assert old.shape == (8, 1, 16, 16, 3)

    alone = Mesh(np.array(jax.devices()[:1]), ("devices",))
    module.mesh_for = lambda batch: alone
    one = pipe(ids, images, params, jax.random.key(1), **settings).images
    np.testing.assert_allclose(split, one, atol=1e-5)
    for i in (0, 5):
        alike = pipe(ids[i : i + 1], images[i : i + 1], params, keys[i], **settings).images
        np.testing.assert_allclose(old[i], alike, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
