"""All that a pipeline can do with adapters, as one mix-in."""

from __future__ import annotations

from sdedit.adapters.ip_adapter import IPAdapterLoader
from sdedit.adapters.lora import LoraLoader
from sdedit.adapters.textual_inversion import TextualInversionLoader


class Adapters(LoraLoader, TextualInversionLoader, IPAdapterLoader):
    """LoRA and its kin, textual inversions, IP-Adapters: loaded, weighed, fused, saved and taken away."""
