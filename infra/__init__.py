"""The Azure side of the stack: settings, the catalogue of GPUs and models, network, cluster, registry, storage."""
