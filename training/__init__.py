"""Container 1: dataset -> LoRA adapter -> artifact."""
