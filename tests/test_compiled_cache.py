"""What one process compiled, the next takes from the disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from torch._dynamo.utils import counters
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.models.unet import UNet2DConditionModel

unet = UNet2DConditionModel(
    down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"], block_out_channels=[16],
    layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2, sample_size=8,
).eval()
pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
pipe.unet = unet
pipe.compile()
with torch.no_grad():
    unet(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++, which is not here")
def test_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def hits_and_misses() -> list[int]:
        done = subprocess.run([sys.executable, "-c", CODE], env=settings, capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()[-2:]]

    first = hits_and_misses()
    assert first[1] > 0  # else nothing was compiled at all
    assert hits_and_misses() == [sum(first), 0]
