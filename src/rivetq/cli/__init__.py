"""The command line ``rivetq``: `pip install rivetq[cli]`.

Commands that only look work on a directory even if a process has it open, and say as of when. Commands that change
something open it themselves; if another process has it open, they say which one.

What the exit statuses mean stands in `command`.
"""

try:
    import click  # noqa: F401  # only to see whether it is there
    import rich  # noqa: F401  # the same
except ImportError as error:  # pragma: no cover  # the tests run where both are installed
    raise SystemExit(f"rivetq: the command line needs click and rich ({error}): pip install rivetq[cli]") from None

from . import changing, looking, measuring, repairing, working  # noqa: F401  # they add their commands to `main`
from .command import main
from .working import load_app

__all__ = ["load_app", "main"]
