"""Run in a process of its own in which torch cannot be imported: load, adapt, draw, save, load again."""

from __future__ import annotations

import sys
from pathlib import Path

sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` fails, as where it is not installed


def main(folder: str, lora: str, embedding: str, pickled: str) -> None:
    import jax
    from PIL import Image

    from sdedit import FlaxEulerDiscreteScheduler, FlaxStableDiffusionImg2ImgPipeline, FlaxUNet2DConditionModel

    jax.config.update("jax_disable_most_optimizations", True)
    pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.scheduler = FlaxEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    params, report = pipe.load_lora_weights(params, lora)
    assert report.supported
    params, _ = pipe.load_textual_inversion(params, embedding)
    prompt_ids, image = pipe.prepare_inputs("a <thing>", Image.new("RGB", (16, 16), "red"))
    drawn = pipe(prompt_ids, image, params, 0, num_inference_steps=2)
    assert drawn.images.shape == (1, 16, 16, 3)
    pipe.unet.save_pretrained(Path(folder).parent / "torch-free", params["unet"])
    FlaxUNet2DConditionModel.from_pretrained(Path(folder).parent / "torch-free")
    try:
        FlaxUNet2DConditionModel.from_pretrained(pickled, use_safetensors=False)
    except ImportError as error:
        assert "is a pickle, which only torch reads" in str(error)
    else:
        raise AssertionError("a pickle was read without torch")
    assert sys.modules["torch"] is None
    assert not any(name.startswith("torch.") for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
