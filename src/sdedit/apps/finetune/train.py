"""Training a LoRA: read the folder, put the LoRA in, take steps, write the file."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdedit.apps.finetune import checkpoint
from sdedit.apps.finetune.dataset import Latents, encode_pictures
from sdedit.apps.finetune.layers import trainable, write_lora
from sdedit.apps.finetune.objective import Denoiser, Objective, fresh_rng, shuffled, spread_times
from sdedit.apps.finetune.pictures import Samples, plot_losses, running_mean
from sdedit.apps.finetune.settings import Settings
from sdedit.apps.finetune.stopping import Stop
from sdedit.apps.finetune.workers import Workers
from sdedit.apps.folders import Example, read_folder
from sdedit.inputs import checks, prompts
from sdedit.models import adapters
from sdedit.models.options.attention import has_fused_projections

GUIDES = 8  # different ones to each picture
GUIDED_FROM = 0.25  # the share of noise levels, the lowest, at which samples start from the picture alone


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        path: The LoRA file.
        folder: What was written as it went: checkpoint, loss plot and samples.
        step: Updates made so far, all runs together.
        finished: All that were asked for are made; `False` after Ctrl-C.
        losses: Of each update.
        seconds: Spent on updates, all runs together.
    """

    path: Path
    folder: Path
    step: int
    finished: bool
    losses: list[float]
    seconds: float


def train_lora(
    pipe: Any,
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    every: int = 100,
    samples: Samples | None = None,
    restart: bool = False,
    progress_bar: bool = True,
    **settings: Any,
) -> TrainResult:
    """Teach a pipeline what the pictures of a folder show, as a LoRA file that `load_lora_weights` and diffusers load.

    The pipeline itself is left as it was. A run that was stopped (Ctrl-C saves and stops) goes on where it was when it
    is started again with the same arguments, and comes to the same weights as one that never stopped.

    Args:
        pipe: Stable Diffusion 1.x or 2.x in float32 or bfloat16, without adapters.
        folder: Pictures with captions, see `read_folder`.
        output: The file, ending in `.safetensors`. What is written as it goes lies in a folder beside it,
            `lora-training` for `lora.safetensors`.
        every: Updates between checkpoints, each with a loss plot and samples.
        samples: Pictures to draw as it goes.
        restart: Start anew, whatever is there.
        progress_bar: Show one.
        **settings: Those of `Settings`, such as `steps`, `rank`, `learning_rate`.

    Raises:
        ValueError, FileNotFoundError: Something of the above is not as described; nothing was changed.
        ImportError: The packages peft and matplotlib are missing.
        RuntimeError: The loss became NaN or infinite; the last checkpoint is kept.
    """
    asked = Settings(**settings)
    checks.whole_number("every", every, 1)
    _require_packages()
    _check_pipe(pipe, asked)
    size = _size(pipe, asked)
    output = Path(output)
    examples = read_folder(Path(folder), asked.caption)
    run = _Run(pipe, asked, examples, output, every=every, samples=samples or Samples(), size=size)
    run.check_place(Path(folder), restart)
    with trainable(pipe, asked) as learning, run.alone():
        run.check_place(Path(folder), restart)  # another run may have ended since
        progress = run.start(learning, restart)
        if progress.step < asked.steps:
            run.train(progress, progress_bar)
    done = progress.step >= asked.steps
    return TrainResult(output, run.folder, progress.step, done, progress.losses, progress.seconds)


class Batches:
    """What the network is shown: a function of the seed and the number of the update alone.

    Args:
        texts: (U, …), the different captions, the empty one first; `text_of` has the row of each picture's.
    """

    def __init__(
        self, latents: Latents, texts: Tensor, text_of: Sequence[int], objective: Objective, settings: Settings
    ) -> None:
        self.latents, self.texts, self.text_of = latents, texts, torch.tensor(text_of)
        self.objective, self.settings = objective, settings

    def draw(self, step: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The passes of an update: noisy latents (B, C, h, w), times (B,), texts (B, …), and what to predict."""
        s, (count, versions, kinds) = self.settings, self.latents.mean.shape[:3]
        total = s.batch_size * s.accumulation
        rng, generator = fresh_rng(s.seed, 1, step)
        rows = torch.tensor(shuffled(step * total, total, count, s.seed))
        version = torch.from_numpy(rng.integers(0, versions, total))
        clean = self.latents.draw(rows, version, torch.zeros_like(version), generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.from_numpy(spread_times(rng, total, len(self.objective.alphas_cumprod)))
        shown = torch.from_numpy(rng.random(total) >= s.prompt_dropout)
        texts = self.texts[torch.where(shown, self.text_of[rows], 0)]
        if kinds > 1:
            guide = self.latents.draw(rows, version, torch.from_numpy(rng.integers(1, kinds, total)), generator)
            noise = self.guided(clean, guide, noise, times, rng)
        noisy, target = self.objective.noisy(clean, noise, times), self.objective.target(clean, noise, times)
        return list(zip(*(t.split(s.batch_size) for t in (noisy, times, texts, target)), strict=True))

    def guided(self, clean: Tensor, guide: Tensor, noise: Tensor, times: Tensor, rng: np.random.Generator) -> Tensor:
        """The noise, and for some of the samples what a guide is away from the picture besides, as if that were noise.

        While a sampler goes down, what is wrong with a guide fades with the noise: hence, for half, all parts of it.
        """
        count, levels = len(times), len(self.objective.alphas_cumprod)
        part = torch.from_numpy(np.where(rng.random(count) < 0.5, 1.0, rng.random(count))).float()
        chosen = torch.from_numpy(rng.random(count) < self.settings.guided) & (times >= GUIDED_FROM * levels)
        alpha, sigma = self.objective.levels(times)
        return noise + (chosen * part).view(-1, 1, 1, 1) * (guide - clean) * alpha / sigma


class _Run:
    """One run: its data, its network, its place on the disk."""

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        examples: list[Example],
        output: Path,
        *,
        every: int,
        samples: Samples,
        size: int,
    ) -> None:
        self.pipe, self.settings, self.examples, self.output = pipe, settings, examples, output
        self.every, self.samples, self.size = every, samples, size
        self.folder = output.with_name(f"{output.stem}-training")
        self.checkpoint = self.folder / checkpoint.NAME
        self.asked = {**settings.to_json(), "size": size, "pictures": _digest(examples), "model": _fingerprint(pipe)}

    def check_place(self, pictures: Path, restart: bool) -> None:
        """Refuse to write over something, unless `restart` allows it."""
        if self.output.suffix != ".safetensors" or not self.output.absolute().parent.is_dir():
            raise ValueError(f"output {self.output}: expected a name such as lora.safetensors, in a folder that exists")
        if self.folder.resolve() == pictures.resolve() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"output {self.output}: {self.folder} is needed for checkpoints, and taken; name another")
        if restart:
            return
        if self.checkpoint.exists():
            before = checkpoint.read_asked(self.checkpoint)
            differ = [name for name, value in self.asked.items() if before.get(name) != value]
            if differ:
                changes = "; ".join(f"{name} was {before.get(name)!r}, is {self.asked[name]!r}" for name in differ)
                raise ValueError(
                    f"{self.checkpoint} is of a run with other settings ({changes}): give the same ones to go on, "
                    "name another output, or restart"
                )
        elif self.output.exists():
            raise ValueError(f"{self.output} exists, without {self.checkpoint} to go on from: name another, or restart")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from the same place; the system lets go of it if this one is killed."""
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"output {self.output}: another run is writing there at this moment; wait for it, or name another"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def start(self, learning: dict[str, nn.Parameter], restart: bool) -> checkpoint.Progress:
        """The optimizer, and the progress of an earlier run if there was one.

        A run begins with a checkpoint of no updates: one that is killed before its first save is not taken for the
        one before it.
        """
        self.learning = learning
        self.optimizer = torch.optim.AdamW(learning.values(), lr=self.settings.learning_rate, weight_decay=0.01)
        if self.checkpoint.exists() and not restart:
            return checkpoint.load(self.checkpoint, learning, self.optimizer)
        progress = checkpoint.Progress()
        checkpoint.save(self.checkpoint, learning, self.optimizer, progress, self.asked)
        return progress

    def train(self, progress: checkpoint.Progress, progress_bar: bool) -> None:
        """Updates until all are made or a stop is asked for, with a save every so often."""
        s = self.settings
        batches = self.prepare(progress_bar)
        dtype = torch.bfloat16 if s.precision == "bfloat16" else None
        model = Denoiser(self.pipe.unet, self.pipe.text_encoder if s.text_encoder else None)
        count = min(s.batch_size, torch.get_num_threads()) if self.pipe.device.type == "cpu" else 1
        if progress.step == 0:
            self.draw_samples(0)
        with (
            Stop() as stop,
            Workers(model, count, dtype) as workers,
            tqdm(total=s.steps, initial=progress.step, unit="step", disable=not progress_bar) as bar,
        ):
            while progress.step < s.steps and not stop():
                began = time.monotonic()
                progress.losses.append(self.update(workers, batches, progress.step))
                progress.seconds += time.monotonic() - began
                progress.step += 1
                bar.set_postfix(loss=f"{running_mean(progress.losses[-200:])[-1]:.4f}", refresh=False)
                bar.update()
                if progress.step % self.every == 0 and progress.step < s.steps:
                    self.save(progress)
            self.save(progress)

    def prepare(self, progress_bar: bool) -> Batches:
        """Latents and texts of all pictures, once."""
        with tqdm(total=len(self.examples), desc="latents", unit="picture", disable=not progress_bar) as bar:
            latents = encode_pictures(
                self.pipe.vae,
                self.examples,
                self.size,
                flip=self.settings.flip,
                guides=GUIDES if self.settings.guided else 0,
                seed=self.settings.seed,
                done=bar.update,
            )
        captions = [example.caption for example in self.examples]
        row_of = {text: row for row, text in enumerate(dict.fromkeys(["", *captions]))}
        objective = Objective.of(self.pipe.scheduler, self.settings.min_snr_gamma)
        texts = self.encode_texts(list(row_of))
        return Batches(latents, texts, [row_of[caption] for caption in captions], objective, self.settings)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Token ids (U, M) if the text encoder learns, else prompt embeds (U, M, D); on the CPU."""
        encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
        if self.settings.text_encoder:
            return torch.from_numpy(prompts.tokenize(tokenizer, texts, prompts.prompt_length(tokenizer, encoder)))
        encode = self.pipe.encode_prompt
        parts = [encode(texts[i : i + 32], do_classifier_free_guidance=False)[0] for i in range(0, len(texts), 32)]
        return torch.cat(parts).cpu()

    def update(self, workers: Workers, batches: Batches, step: int) -> float:
        """One update of the weights; the loss before it."""

        def loss(model: nn.Module, noisy: Tensor, times: Tensor, texts: Tensor, target: Tensor) -> Tensor:
            return batches.objective.loss(model(noisy, times, texts), target, times).mean()

        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        passes = batches.draw(step)
        values = [
            workers.backward(loss, *(tensor.to(self.pipe.device) for tensor in one), weight=1 / len(passes))
            for one in passes
        ]
        value = sum(values) / len(values)
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at update {step + 1}: lower the learning rate, or use float32")
        nn.utils.clip_grad_norm_(list(self.learning.values()), 1.0)
        self.optimizer.step()
        return value

    def save(self, progress: checkpoint.Progress) -> None:
        """Checkpoint, LoRA file, loss plot and samples."""
        checkpoint.save(self.checkpoint, self.learning, self.optimizer, progress, self.asked)
        write_lora(self.pipe, self.settings, self.output)
        plot_losses(progress.losses, self.settings, self.folder / "loss.png")
        self.draw_samples(progress.step)

    def draw_samples(self, step: int) -> None:
        self.samples.draw(self.pipe, self.examples, self.size, self.folder / f"samples-{step:06d}.png")


def _require_packages() -> None:
    for package in ("peft", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"training needs the package {package}: pip install 'sdedit[train]' ({error})") from error


def _check_pipe(pipe: Any, settings: Settings) -> None:
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("pipe: it has no text encoder or tokenizer, and captions need both")
    if adapters.layers(pipe.unet) or adapters.layers(pipe.text_encoder) or pipe.unet.encoder_hid_proj is not None:
        raise ValueError("pipe: it has adapters; unload_lora_weights and unload_ip_adapter first")
    if has_fused_projections(pipe.unet):
        raise ValueError("pipe: its projections are fused; unfuse_qkv_projections first")
    allowed = (torch.float32, torch.bfloat16)
    if pipe.dtype not in allowed:
        raise ValueError(f"pipe: {pipe.dtype}; expected float32 or bfloat16 (gradients are lost in float16)")


def _size(pipe: Any, settings: Settings) -> int:
    """Side of the square that pictures are cut to."""
    own, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    size = settings.size or (own * factor if isinstance(own, int) else None)
    if size is None or size % factor:
        raise ValueError(f"size={size}; expected a multiple of {factor}, such as {64 * factor}")
    return size


def _digest(examples: Sequence[Example]) -> str:
    """A hash of all captions and files."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.path.name}\0{example.caption}\0".encode())
        digest.update(example.path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(pipe: Any) -> str:
    """A hash that tells models apart: the first and the last layer of the UNet."""
    digest = hashlib.sha256()
    for layer in (pipe.unet.conv_in, pipe.unet.conv_out):
        digest.update(np.ascontiguousarray(layer.weight.detach().float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
