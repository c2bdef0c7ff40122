"""huey: SqliteHuey and its consumer, without results and without periodic tasks.

Variants are what `fsync` is, and how many threads: `durable-8`. `default` gives no `fsync`, so SQLite's own default
decides: in most builds a sync for each commit too. Taking a job removes it. The consumer polls only when it finds
nothing, which is after the last job.
"""

from __future__ import annotations

import importlib
from typing import Any

from meter import QUEUE, Meter, asked

FSYNC = {"durable": True, "relaxed": False, "default": None}


def main() -> None:
    this = asked()
    meter = Meter(this.jobs, this.report)
    huey: Any = importlib.import_module("huey")
    mode, _, threads = this.variant.partition("-")
    fsync = False if this.fill else FSYNC[mode]  # nobody measures the filling
    app = huey.SqliteHuey(QUEUE, filename=f"{this.place}/huey.db", results=False, fsync=fsync)
    noop = app.task(name="noop")(meter.done)
    if this.fill:
        for n in range(this.jobs):
            noop(n)
        app.storage.close()
        return
    app.create_consumer(workers=int(threads), worker_type="thread", periodic=False).run()


if __name__ == "__main__":
    main()
