"""Tokens that the front gives out and knows again: JWTs by a key of its own that lasts as long as its folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from jwt.algorithms import RSAAlgorithm

from localcloud.front.authority import private_key

ALGORITHM = "RS256"


class Tokens:
    """`key`: a PEM file, made where there is none."""

    def __init__(self, key: Path) -> None:
        self._key = private_key(key)
        self.public = RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True) | {"use": "sig", "kid": "drydock-local"}

    def issue(self, issuer: str, audience: str, seconds: int, claims: Mapping[str, Any]) -> str:
        now = int(time.time())
        times = {"iat": now, "nbf": now, "exp": now + seconds}
        content = {"iss": issuer, "aud": audience, "jti": str(uuid.uuid4()), **times, **claims}
        return jwt.encode(content, self._key, ALGORITHM, {"kid": self.public["kid"]})

    def read(self, token: str, issuer: str, audiences: list[str]) -> dict[str, Any]:
        """The claims. Raises `jwt.InvalidTokenError` for one that is not ours, is over, or is for somebody else."""
        return jwt.decode(
            token, self._key.public_key(), [ALGORITHM], issuer=issuer, audience=audiences,
            options={"require": ["exp"]},
        )  # fmt: skip
