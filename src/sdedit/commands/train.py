"""`sdedit train lora`: a LoRA from a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.apps.finetune.settings import Settings
from sdedit.commands.drawing import device_and_dtype, load_model, open_guide
from sdedit.commands.options import Place, command
from sdedit.commands.saving import check_output, say, tell
from sdedit.commands.settings import SUITED, USUAL

app = typer.Typer(help="Teach a model something new.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@command(without=("place.size",))
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
    settings: Settings,
    place: Place,
    model: Annotated[
        str, typer.Option(help="A model folder, single file or hub id; 'default' is the one in the package.")
    ] = "default",
    every: Annotated[int, typer.Option(min=1, help="Updates between checkpoints, with samples and a loss plot.")] = 100,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw as it goes; may be given again. Four captions if not given.")
    ] = None,
    sample_image: Annotated[
        list[Path] | None, typer.Option(help="Image to start from, for each --sample-prompt; one for all will do.")
    ] = None,
    sample_strength: Annotated[float, typer.Option(min=0, max=1, help="How far to go from the images.")] = 0.7,
    samples: Annotated[bool, typer.Option(help="Draw pictures as it goes.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Start anew, over what is there.")] = False,
) -> None:
    """Teach a model what the pictures of FOLDER show; Ctrl-C saves, and the same command goes on."""
    from sdedit.apps.finetune import Samples, train_lora

    check_output(output, kinds=(".safetensors",))
    images = [open_guide(path, place) for path in sample_image or ()]
    suits = SUITED if model == "default" else USUAL
    where, dtype = device_and_dtype(place.device, settings.precision)
    result = train_lora(
        load_model(model, dtype).to(where),
        folder,
        output,
        every=every,
        samples=Samples(
            (sample_prompt or None) if samples else [],
            images,
            strength=sample_strength,
            guidance=suits.guidance,
        ),
        restart=restart,
        **vars(settings),
    )
    tell(result.path)
    state = "finished" if result.finished else "stopped; the same command goes on"
    minutes = result.seconds / 60
    say(f"{result.step} of {settings.steps} updates, {minutes:.1f} min, {state}; samples and plot: {result.folder}")
