"""``python -P -m infra COMMAND``: the server commands of ``headrace``."""

from __future__ import annotations

from infra.cli import main

if __name__ == "__main__":
    main()
