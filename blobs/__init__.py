"""Blob Storage as a place for models, datasets and checkpoints: whole or absent, verified, by Entra identity."""


class BlobError(Exception):
    """A trouble with Blob Storage or another server that another attempt may not meet: no answer, throttling, 5xx."""
