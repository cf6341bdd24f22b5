"""Nearly the same picture in a fraction of the time: the part of a pipeline that turns this on and off."""

from __future__ import annotations

from typing import Any

from sdedit import checks
from sdedit.models.deep_reuse import DeepReuse

# One UNet call in so many is whole; docs/performance.md has what each level costs in the picture.
LEVELS = {1: 3, 2: 5, 3: 8}


class Turbo:
    """Methods that trade exactness for time; off unless asked for."""

    unet: Any
    do_classifier_free_guidance: Any  # the pipeline's property
    _guidance_scale: Any
    _guided = 1.0

    def enable_turbo(self, level: int = 2, guidance: float = 1.0) -> None:
        """Let the deep features of the UNet serve several steps, see `DeepReuse`. All else stays as it is.

        Args:
            level: 1 computes them in every third UNet call, 2 in every fifth, 3 in every eighth. The more steps a call
                has, the more time it saves and the less it changes the picture.
            guidance: The part of the steps, from the first, that is guided; the rest follow the prompt alone, in half
                the time. Guidance counts where there is much noise (Kynkäänniemi et al. 2024, arXiv 2404.07724).

        Raises:
            ValueError: There is no such level, `guidance` is not from 0 to 1, or the UNet is not one of sdedit's.
        """
        level = checks.whole_number("level", level, 1)
        if level not in LEVELS:
            raise ValueError(f"level={level}; expected one of {', '.join(map(str, LEVELS))}")
        guided = checks.number("guidance", guidance, 0, 1)
        self._own_unet("enable_turbo").reuse = DeepReuse(LEVELS[level])
        self._guided = guided

    def enable_token_merging(self, factor: int = 2) -> None:
        """Let self-attention at the UNet's finest level see means of `factor` × `factor` pixels (arXiv 2402.13573).

        Each pixel still asks for itself; there are `factor`² times fewer to ask. At 512×512 that level takes most of
        the time of attention, at larger sizes most of a step.

        Raises:
            ValueError: `factor` is below 1, the UNet is not one of sdedit's, or its projections are fused.
        """
        factor = checks.whole_number("factor", factor, 1)
        self._own_unet("enable_token_merging").merge_tokens(factor)

    def disable_token_merging(self) -> None:
        """Let every pixel see all pixels again."""
        self._own_unet("disable_token_merging").merge_tokens(1)

    def disable_turbo(self) -> None:
        """Compute every UNet call whole again."""
        self.unet.reuse, self._guided = None, 1.0

    def _own_unet(self, asked: str) -> Any:
        """The UNet, if it is one that can do what is asked."""
        if not hasattr(self.unet, "merge_tokens"):
            raise ValueError(f"{asked}: unet is {type(self.unet).__name__}; expected sdedit's UNet2DConditionModel")
        return self.unet

    def _end_guidance(self, done: float, tensors: dict[str, Any]) -> None:
        """Go on by the prompt alone, if that much of the run is as much as is guided."""
        if done >= self._guided and self.do_classifier_free_guidance:
            self._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
