"""Fine-tuning: teach a Stable Diffusion model a style or a thing from a folder of pictures, as a small LoRA file.

`train.py` is the story: read the folder (`dataset.py`), put a LoRA into the networks (`layers.py`), and take steps
(`objective.py` has what is learned, `workers.py` how a step uses the cores), with checkpoints (`checkpoint.py`) and
pictures of how it goes (`pictures.py`).
"""

from sdedit.apps.finetune.pictures import Samples
from sdedit.apps.finetune.settings import Settings
from sdedit.apps.finetune.train import TrainResult, train_lora

__all__ = ["Samples", "Settings", "TrainResult", "train_lora"]
