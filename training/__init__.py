"""Container 1: dataset -> LoRA adapter -> artifact."""

import logging

# peft imports bitsandbytes wherever it is installed, which then misses a kernel for CPUs that it would get from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
