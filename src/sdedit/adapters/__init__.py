"""What is added to a loaded model: LoRA and its kin, textual inversions, IP-Adapters."""
