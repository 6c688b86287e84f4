"""``headrace up`` on a log's server that syncs when it likes to, every two minutes: the contrast to the power cut.

The platform has no switch for this, so it is done to it from outside, here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from infra import cli
from infra.embedded import NatsServer

_synced = NatsServer._config  # noqa: SLF001


def _lax(self: NatsServer) -> dict[str, Any]:
    config = _synced(self)
    del config["jetstream"]["sync_interval"]
    return config


def main() -> None:
    """Run one command of the platform's with the server's default."""
    NatsServer._config = _lax  # type: ignore[method-assign]  # noqa: SLF001
    cli.main()


if __name__ == "__main__":
    main()
