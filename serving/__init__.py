"""Container 2: vLLM with its request layer, the adapter sidecar, the router's settings, and evaluation."""
