"""`sdedit train lora`: a LoRA from a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import load_model, place, say
from sdedit.commands.options import open_guide

app = typer.Typer(help="Teach a model something new.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def lora(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Pictures; captions are metadata.jsonl or .csv (file_name, text), text files, or the file names."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write, such as lora.safetensors; goes on if stopped.")
    ],
    model: o.Model = "default",
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 1000,
    batch: Annotated[int, typer.Option(help="Pictures in one pass.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Passes for one update.")] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Updates until the learning rate is at its peak.")] = 50,
    rank: Annotated[int, typer.Option(help="Size of the LoRA: 4 to 16 for a style.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="It is scaled by alpha / rank; the rank if not given.")] = None,
    targets: Annotated[
        str, typer.Option(help="Ends of the names of the UNet's layers that learn, with commas.")
    ] = "to_q,to_k,to_v,to_out.0",
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="The text encoder learns too.")] = False,
    min_snr: Annotated[float, typer.Option(help="Gamma of min-SNR weighting; 0 turns it off.")] = 5.0,
    dropout: Annotated[float, typer.Option(help="Share of pictures shown without their caption.")] = 0.1,
    caption: Annotated[str, typer.Option(help="'{}' stands for a picture's own: '{}, blueprint'.")] = "{}",
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the model's own.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Show pictures mirrored half of the time.")] = False,
    guided: Annotated[
        float,
        typer.Option(help="Share of samples that start from recoloured, blurred pictures, as from a user's image."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same LoRA.")] = 0,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: o.Device = "auto",
    every: Annotated[int, typer.Option(help="Updates between checkpoints, with samples and a loss plot.")] = 100,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw as it goes; may be given again. Four captions if not given.")
    ] = None,
    sample_image: Annotated[
        list[Path] | None, typer.Option(help="Image to start from, for each --sample-prompt; one for all will do.")
    ] = None,
    sample_strength: Annotated[float, typer.Option(help="How far to go from the images.")] = 0.7,
    samples: Annotated[bool, typer.Option(help="Draw pictures as it goes.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Start anew, over what is there.")] = False,
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Teach a model what the pictures of FOLDER show; Ctrl-C saves, and the same command goes on."""
    from sdedit.apps.finetune import Samples, train_lora

    images = [open_guide(path, max_megapixels) for path in sample_image or ()]
    usual = o.suited(model)
    where, dtype = place(device, precision)
    result = train_lora(
        load_model(model, dtype).to(where),
        folder,
        output,
        every=every,
        samples=Samples(
            (sample_prompt or None) if samples else [],
            images,
            strength=sample_strength,
            guidance=usual.guidance,
        ),
        restart=restart,
        steps=steps,
        batch_size=batch,
        accumulation=accumulate,
        learning_rate=rate,
        warmup=warmup,
        rank=rank,
        alpha=alpha,
        targets=tuple(name.strip() for name in targets.split(",")),
        text_encoder=text_encoder,
        min_snr_gamma=min_snr or None,
        prompt_dropout=dropout,
        caption=caption,
        size=size,
        flip=flip,
        guided=guided,
        precision=precision,
        seed=seed,
    )
    typer.echo(result.path)
    state = "finished" if result.finished else "stopped; the same command goes on"
    say(f"{result.step} of {steps} updates, {result.seconds / 60:.1f} min, {state}; samples and plot: {result.folder}")
