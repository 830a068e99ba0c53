"""What a safetensors file holds, by its header alone."""

from __future__ import annotations

from pathlib import Path


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in `path` by its name. Raises ValueError for a file that is cut or none of its kind."""
    from safetensors import SafetensorError, safe_open  # not on a deployer's machine, who lists and promotes adapters

    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from None
