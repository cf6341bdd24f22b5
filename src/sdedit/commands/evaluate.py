"""`sdedit evaluate`: SDEdit's curve of a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import ready_pipe, say
from sdedit.commands.metadata import Settings
from sdedit.commands.options import numbers


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(help="Real pictures; captions are metadata.jsonl (file_name, text), text files, or file names."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The table, curve.csv; the plot goes beside it.")],
    strengths: Annotated[str, typer.Option(help="Comma-separated, each from 0 to 1.")] = (
        "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"
    ),
    guides: Annotated[
        Path | None, typer.Option(help="A guide for each picture, of the same file name; else strokes are simulated.")
    ] = None,
    colors: Annotated[int, typer.Option(help="Colours of the simulated strokes.")] = 6,
    kernel: Annotated[int | None, typer.Option(help="Their breadth in pixels, odd; 23 at 256×256.")] = None,
    model: o.Model = "default",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    scheduler: o.Scheduler = None,
    repeats: o.Repeats = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same curve.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 8,
    side: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the model's own.")] = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    debug: o.Debug = False,
) -> None:
    """Measure how real and how faithful pictures become as strength rises; stop it and start it again as you like."""
    if output.suffix.lower() != ".csv" or not output.absolute().parent.is_dir():
        raise ValueError(f"-o {output}: expected a table's name, such as curve.csv, in a folder that exists")
    levels = numbers("--strengths", strengths)
    usual = o.suited(model)
    settings = Settings("", model=model, scheduler=scheduler, dtype=None if dtype == "auto" else dtype)
    pipe = ready_pipe(settings, device)
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
        num_inference_steps=usual.steps if steps is None else steps,
        guidance_scale=usual.guidance if guidance is None else guidance,
        repeats=repeats,
    )
    write_csv(rows, output)
    for row in rows:
        what = f"strength {row.strength:g}" if row.what == "drawn" else row.what
        typer.echo(f"{what}: L2 {row.l2:.1f}, kernel distance on wavelet features {row.wavelet_kernel_distance:.4g}")
    typer.echo(output)
    from sdedit.apps.evaluation.plot import plot_curve

    try:
        plot_curve({model: rows}, output.with_suffix(".png"))
        typer.echo(output.with_suffix(".png"))
    except ModuleNotFoundError as error:
        say(f"warning: {error}")
