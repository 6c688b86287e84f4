"""What a power cut can leave in the store of the log's server that it does not start from, mended before it starts.

The server writes over the state of a consumer (what was delivered, what was acknowledged) without syncing it, also when
it syncs everything else. Depending on the file system, such a file comes back empty or full of zeros; the server then
refuses the consumer, and refuses to make it anew. That state is worth little: without it, work that is done already is
delivered once more, and its outcome is found in the log.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

STATE_MAGIC = 22  # first byte of the state of a consumer
STATE_BYTES_MIN = 2


def mend(stream_dir: Path) -> list[str]:
    """Remove what the server cannot read of the consumers of one stream, and return their names.

    The server must not run. What is removed is made anew: the state by the server, a whole consumer by
    ``streams.topology.ensure``.
    """
    mended = []
    for consumer in sorted((stream_dir / "obs").glob("*")):
        state = consumer / "o.dat"
        if not _is_described(consumer):
            shutil.rmtree(consumer, ignore_errors=True)
        elif state.is_file() and not _is_state(state):
            state.unlink()
        else:
            continue
        mended.append(consumer.name)
    if mended:
        _log.warning("consumers were damaged, as by a power cut; their work is delivered once more", consumers=mended)
    return mended


def _is_described(consumer: Path) -> bool:
    try:
        json.loads((consumer / "meta.inf").read_bytes())
    except (OSError, ValueError):
        return False
    return (consumer / "meta.sum").is_file() and (consumer / "meta.sum").stat().st_size > 0


def _is_state(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(STATE_BYTES_MIN)
    return len(head) == STATE_BYTES_MIN and head[0] == STATE_MAGIC
