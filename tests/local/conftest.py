"""Parts of a local cluster whose pods really run; not in `make test` before the whole is there (`make local-parts`)."""

from tests.engine.conftest import tools

__all__ = ["tools"]
