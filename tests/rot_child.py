"""Opens mutated copies of a directory, one after another; run as a child so that a signal is seen, not suffered.

Standard input: JSON lines {"file": relative path, "offset": n, "bit": b}. One JSON line of answer for each:
{"dump": text} or {"error": class name, "file": relative path, "offset": n}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rivetq import CorruptLogError, FormatError
from rivetq.codec import decode_record
from rivetq.index import Index
from rivetq.io import SystemDisk
from rivetq.machine import Machine
from rivetq.recovery import recover
from rivetq.state import Place
from rivetq.testing import ManualClock


def opened(directory: Path) -> str:
    """The state that an opening finds, as text; nothing is changed."""
    disk = SystemDisk()
    found = recover(disk, str(directory), Index(disk, str(directory / "index")), ManualClock(), Machine)
    for body in found.surplus:  # whole, but nobody knows it to be on disk: an opening writes it again
        now_ms, events = decode_record(body)
        found.machine.now_ms = max(found.machine.now_ms, now_ms)
        for event in events:
            found.machine.apply(event, now_ms, Place(found.last_segment + 1, 0, 0))
    found.machine.advance(found.machine.now_ms)  # what the clock alone decides is not in the log
    found.machine.check()
    return repr(found.machine.dump())


def main() -> None:
    directory = Path(sys.argv[1])
    for line in sys.stdin:
        mutation = json.loads(line)
        path = directory / mutation["file"]
        whole = path.read_bytes()
        rotten = bytearray(whole)
        rotten[mutation["offset"]] ^= 1 << mutation["bit"]
        path.write_bytes(rotten)
        try:
            answer: dict[str, object] = {"dump": opened(directory)}
        except CorruptLogError as error:
            answer = {
                "error": "CorruptLogError",
                "file": str(Path(error.file).relative_to(directory)),
                "offset": error.offset,
            }
        except FormatError:
            answer = {"error": "FormatError"}
        finally:
            path.write_bytes(whole)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
