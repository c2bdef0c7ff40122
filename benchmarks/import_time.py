"""How long ``import rivetq`` takes, beside an interpreter that imports nothing: the bar is 100 ms.

python benchmarks/import_time.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

ROUNDS = 15
BAR_MS = 100


def seconds(code: str) -> float:
    """Of a whole interpreter that runs this; its bytecode is cached, as where a package is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return time.perf_counter() - started


def main() -> None:
    for name in ("rivetq", "rivetq.tasks", "rivetq.worker", "rivetq.aio"):
        seconds(f"import {name}")  # which writes the bytecode
        rounds = [seconds(f"import {name}") - seconds("pass") for _ in range(ROUNDS)]
        bar = f" (bar: {BAR_MS} ms)" if name == "rivetq" else ""
        low, middle, high = (round(1000 * each(rounds)) for each in (min, statistics.median, max))
        print(f"import {name:14} median {middle} ms, {low} to {high} ms{bar}")


if __name__ == "__main__":
    main()
