"""Encode the listed pictures, placed about the sheet, and guides made from them, once for the UNet to learn from.

    python training/latents.py

writes `latents.npy` (pictures, versions, 3, 8, 16, 16), float16, where the 3 are the picture, strokes and a doodle
of it; `latents.json` with the row of each picture in items.json; and the finished VAE, latents centred, into `vae/`.
"""

import argparse
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import Item, load, things
from guides import background, doodle, on, place, strokes
from paths import work_folder, write_json
from sdedit.models.vae import AutoencoderKL
from train_vae import CONFIG, load_vae, on_background, to_tensor


def centred(vae: AutoencoderKL, latents: Tensor) -> AutoencoderKL:
    """The same autoencoder with every latent channel shifted and scaled to mean 0 and deviation 1.

    The two 1x1 convolutions beside the latents take it up, so nothing else changes.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    print("channel deviations before:", [round(value, 2) for value in std.tolist()])
    shape = (-1, 1, 1, 1)
    count = len(mean)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:count] /= std.view(shape)
        quant.bias[:count] = (quant.bias[:count] - mean) / std
        quant.bias[count:] -= 2 * std.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std.view(1, -1, 1, 1)
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: list[np.ndarray]) -> Tensor:
    batch = to_tensor([image.astype(np.float32) / 127.5 - 1 for image in images])
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(batch).latent_dist.mode().float()


def finished_vae() -> AutoencoderKL:
    """The VAE as it ships: read from vae/, or made from the checkpoint by centring its latents."""
    folder = work_folder() / "vae"
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        pictures, items = load()
        rows = [i for i, item in enumerate(items) if item.name in things() and not item.held_out][::4]
        white = [(on_background(pictures[i], np.ones(3, np.float32)) + 1) * 127.5 for i in rows]
        vae = load_vae()
        vae = centred(vae, torch.cat([encode(vae, white[k : k + 16]) for k in range(0, len(white), 16)]))
        folder.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in vae.state_dict().items()}, weights)
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(load_file(weights))
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def versions(picture: np.ndarray, item: Item, count: int) -> list[np.ndarray]:
    """`count` times the picture, strokes and a doodle; placed alike for all styles of the same thing."""
    images = []
    for version in range(count):
        same = np.random.default_rng([zlib.crc32(item.code.encode()), version])
        own = np.random.default_rng([zlib.crc32(f"{item.code} {item.style}".encode()), version])
        sheet, colour = place(picture, same), background(same)
        true = on(sheet, colour)
        images += [np.asarray(image) for image in (true, strokes(true, own), doodle(sheet, colour, own))]
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=6, help="placements of each picture")
    parser.add_argument("--workers", type=int, default=2, help="CPU cores to use")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures, items = load()
    vae = finished_vae()
    rows = [i for i, item in enumerate(items) if item.name in things()]
    out = np.zeros((len(rows), args.versions, 3, 8, 16, 16), np.float16)

    def one(n: int) -> None:
        latents = encode(vae, versions(pictures[rows[n]], items[rows[n]], args.versions))
        out[n] = latents.numpy().reshape(out.shape[1:])

    with ThreadPoolExecutor(args.workers) as pool:
        for n, _ in enumerate(pool.map(one, range(len(rows)))):
            if n % 200 == 0:
                print(f"{n} of {len(rows)} pictures", flush=True)
    np.save(work_folder() / "latents.npy", out)
    write_json(rows, work_folder() / "latents.json")
    print(f"standard deviation {out[:, :, 0].astype(np.float32).std():.3f}")


if __name__ == "__main__":
    main()
