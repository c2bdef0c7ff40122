"""The worker: it leases jobs in batches, runs their tasks in pools, and answers in batches.

What a handler needs (`Retry`, `Snooze`, `Reject`, `current_job`) can be imported from here, too.
"""

from ..tasks import Reject, Retry, Snooze, current_job
from .options import Concurrency, Settled
from .worker import Worker

__all__ = ["Concurrency", "Reject", "Retry", "Settled", "Snooze", "Worker", "current_job"]
