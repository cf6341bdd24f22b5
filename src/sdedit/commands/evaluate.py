"""`sdedit evaluate`: SDEdit's curve of a folder of pictures; `sdedit strokes`: its guides."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sdedit.commands.drawing import Torch, check, open_guide
from sdedit.commands.options import Place, command, numbers
from sdedit.commands.saving import check_output, check_size, save_picture, say, surely, tell
from sdedit.commands.settings import PictureSettings

_NOT_HERE = (
    *("image", "prompt", "strength", "negative", "lora", "seed", "backend", "exact_steps", "extra_noise"),
    *("mask", "feather", "strength_map", "weighting", "clip_skip", "embeddings", "size", "max_megapixels"),
)


@command(without=_NOT_HERE)
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(help="Real pictures; captions are metadata.jsonl (file_name, text), text files, or file names."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The table, curve.csv; the plot goes beside it.")],
    settings: PictureSettings,
    place: Place,
    strengths: Annotated[str, typer.Option(help="Comma-separated, each from 0 to 1.")] = (
        "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"
    ),
    guides: Annotated[
        Path | None, typer.Option(help="A guide for each picture, of the same file name; else strokes are simulated.")
    ] = None,
    colors: Annotated[int, typer.Option(min=1, max=256, help="Colours of the simulated strokes.")] = 6,
    kernel: Annotated[int | None, typer.Option(help="Their breadth in pixels, odd; 23 at 256×256.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same curve.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Pictures drawn at once.")] = 8,
    side: Annotated[
        int | None, typer.Option(min=8, max=10_000, help="Side of the pictures in pixels; the model's own.")
    ] = None,
) -> None:
    """Measure how real and how faithful pictures become as strength rises; stop it and start it again as you like."""
    check_output(output, kinds=(".csv",))
    check(settings, place)
    levels = numbers("--strengths", strengths)
    settings.suit()
    pipe = Torch(settings, place.device).pipe
    pipe.set_progress_bar_config(disable=True)
    from tqdm.auto import tqdm

    from sdedit.apps.evaluation.curve import evaluate as draw_curve
    from sdedit.apps.evaluation.curve import read_inputs, write_csv

    def progress(batches: Iterable[Any]) -> Iterable[Any]:
        return tqdm(batches, unit="batch")

    own = pipe.unet.config.sample_size
    side = side or (own * pipe.vae_scale_factor if isinstance(own, int) else 256)
    rows = draw_curve(
        pipe,
        read_inputs(folder, side, guides=guides, colors=colors, kernel=kernel),
        levels,
        folder=output.with_name(f"{output.stem}-pictures"),
        batch=batch,
        seed=seed,
        progress=progress,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        repeats=settings.repeats,
    )
    write_csv(rows, output)
    for row in rows:
        what = f"strength {row.strength:g}" if row.what == "drawn" else row.what
        tell(f"{what}: L2 {row.l2:.1f}, kernel distance on wavelet features {row.wavelet_kernel_distance:.4g}")
    tell(output)
    from sdedit.apps.evaluation.plot import plot_curve

    try:
        plot_curve({settings.model: rows}, output.with_suffix(".png"))
        tell(output.with_suffix(".png"))
    except ModuleNotFoundError as error:
        say(f"warning: {error}")


@command(without=("device", "size"))
def strokes(
    photo: Annotated[Path, typer.Argument(help="A picture of any format and size.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the strokes go.")],
    place: Place,
    colors: Annotated[int, typer.Option(min=1, max=256, help="Colours that are left at most.")] = 6,
    kernel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Breadth of the brush in pixels, odd; 23 is for 256×256, scale it with the picture.",
        ),
    ] = 23,
) -> None:
    """Make of PHOTO what somebody might paint of it: few colours, nothing fine; a guide for tests and demos."""
    check_output(output)
    if kernel % 2 == 0:
        raise ValueError(f"--kernel {kernel}; expected an odd number, such as {kernel + 1}")
    image = open_guide(photo, place)
    check_size(image.size, output)
    from sdedit.apps.strokes import simulate_strokes

    saved, problem = surely(partial(save_picture, simulate_strokes(image, colors, kernel)), output)
    tell(saved)
    if problem:
        raise OSError(problem)
