"""Errors as the real provider reports those of Azure Resource Manager."""

from __future__ import annotations

from typing import Any


class AzureError(Exception):
    """A refusal of Azure; its text is that of azure-native's PulumiAzcoreResponseError."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f'Status={status} Code="{code}" Message="{message}"')
        self.status, self.code, self.message = status, code, message


class HalfMade(Exception):
    """The thing is there, but its creation or update ended in an error: the engine keeps it and says why."""

    def __init__(self, id_: str, outputs: dict[str, Any], inputs: dict[str, Any], reason: str) -> None:
        super().__init__(reason)
        self.id, self.outputs, self.inputs = id_, outputs, inputs


class ProviderError(Exception):
    """The provider's own refusal; its text is what the engine prints."""
