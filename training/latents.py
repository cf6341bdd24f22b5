"""Encode the pictures and guides made from them, for the UNet: as they are and, if listed, placed about the sheet.

    python training/latents.py

writes `latents.npy` (sheets, kinds, 8, 16, 16), float16, where the kinds are those of guides.KINDS and the sheets of a
picture follow each other, the first of them the picture as it is, on white; `latents.json` with the row in items.json
of what each sheet shows; and, if the encoder was trained here, `centre.json`, what centres its latents.
"""

import argparse
import multiprocessing
import os
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captions import things, training_rows
from data import load, on_ground
from grow import grown_vae
from guides import KINDS, WHITE, background, guided, place
from loop import read_state
from model import averaged, growing, new_vae
from paths import read_json, work_folder, write_json
from sdedit.models.vae import AutoencoderKL
from train_vae import pools, to_tensor


def centred(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """The same autoencoder with every latent channel shifted and scaled, from this mean and deviation to 0 and 1.

    The two 1x1 convolutions beside the latents take it up, so nothing else changes.
    """
    count = len(mean)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:count] /= std.view(-1, 1, 1, 1)
        quant.bias[:count] = (quant.bias[:count] - mean) / std
        quant.bias[count:] -= 2 * std.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std.view(1, -1, 1, 1)
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Pictures (N, H, W, 3) in [0, 1] → latents (N, 8, H/16, W/16), float32, on the CPU."""
    batch = to_tensor(list(pictures)).to(vae.device)
    with torch.autocast(vae.device.type, torch.bfloat16):
        return vae.encode(batch).latent_dist.mode().float().cpu()


def finished_vae() -> AutoencoderKL:
    """The autoencoder as it ships: averaged weights, and latents centred, if the encoder was trained here.

    One that was grown finds the latents of the start.
    """
    if growing():
        return grown_vae()
    file = work_folder() / "vae.pt"
    vae = averaged(new_vae(), file)
    if not file.exists() or not any(name.startswith("encoder") for name in read_state(file)["average"]):
        return vae
    centre = work_folder() / "centre.json"
    if not centre.exists():
        pictures, items = load()
        rows = pools(items)[1][::4]
        latents = torch.cat([encode(vae, on_ground(pictures[rows[k : k + 16]])) for k in range(0, len(rows), 16)])
        write_json([latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()], centre)
    return centred(vae, *map(torch.tensor, read_json(centre)))


def placements(row: int, count: int) -> np.ndarray:
    """A picture and its guides `count` times, (count * kinds, 256, 256, 3), uint8; alike in all styles."""
    pictures, items = load()
    item, images = items[row], []
    for n in range(count):
        same = np.random.default_rng([zlib.crc32(item.code.encode()), n])
        own = np.random.default_rng([zlib.crc32(f"{item.code} {item.style}".encode()), n])
        sheet, colour = (place(pictures[row], same), background(same)) if n else (Image.fromarray(pictures[row]), WHITE)
        images += [np.asarray(image) for image in guided(sheet, colour, own)]
    return np.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placements", type=int, default=5, help="of each picture of a thing in things.txt")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that make guides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of the CPU: the processes that make guides need the rest
    items = load()[1]
    pictures = training_rows(items)
    counts = [args.placements if items[row].name in things() else 1 for row in pictures]
    rows = np.repeat(pictures, counts).tolist()
    vae = finished_vae().to(args.device)
    out = np.zeros((len(rows), len(KINDS), 8, 16, 16), np.float16)
    done = 0
    # New processes, not forks: the parent holds threads of PyTorch.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for images in pool.map(placements, pictures, counts, chunksize=8):
            latents = encode(vae, images.astype(np.float32) / 255)
            sheets = out[done : done + len(images) // len(KINDS)]
            sheets[:] = latents.numpy().reshape(sheets.shape)
            if done // 500 < (done := done + len(sheets)) // 500:
                print(f"{done} of {len(rows)} sheets", flush=True)
    np.save(work_folder() / "latents.npy", out)
    write_json(rows, work_folder() / "latents.json")
    deviation = out[:, 0].astype(np.float32).std()
    print(f"{len(rows)} sheets of {len(pictures)} pictures, standard deviation {deviation:.3f}")


if __name__ == "__main__":
    main()
