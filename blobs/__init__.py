"""Blob Storage as a place for models, datasets and checkpoints: whole or absent, verified, by Entra identity."""


class BlobError(Exception):
    """A trouble with Blob Storage that another attempt may not meet: no connection, throttling, 5xx."""
