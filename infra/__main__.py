"""``python -P -m infra COMMAND``: the server commands of ``headrace``."""

from __future__ import annotations

from infra.lean import import_lean

if __name__ == "__main__":
    import_lean()

    from infra.cli import main

    main()
