"""RivetQ: a durable job queue that lives inside a Python process.

>>> import rivetq
>>> broker = rivetq.Broker(":memory:")
>>> job_id = broker.enqueue("mail", {"to": "ada@example.org"}, priority=7)
>>> lease = broker.lease("mail")
>>> lease.json()
{'to': 'ada@example.org'}
>>> lease.ack()
>>> broker.close()
"""

from .broker.broker import Broker, Waiting
from .broker.transaction import Transaction
from .clock import Clock, SystemClock
from .engine import Backup, Capabilities
from .errors import (
    BrokerClosedError,
    BrokerFailedError,
    BrokerLockedError,
    CapacityError,
    CorruptLogError,
    DiskFullError,
    DuplicateJobError,
    ForkedBrokerError,
    FormatError,
    JobError,
    JobNotFoundError,
    LeaseLostError,
    QueueFullError,
    RateLimitedError,
    RivetQError,
    StorageError,
    UsageError,
)
from .histogram import Histogram
from .model import (
    Deliveries,
    Health,
    Job,
    JobId,
    JobState,
    Lease,
    LeaseLike,
    LeaseRef,
    QueueConfig,
    QueueStats,
    RateLimit,
    RetryPolicy,
)
from .units import Duration

__version__ = "0.1.0"

__all__ = [
    "Backup",
    "Broker",
    "BrokerClosedError",
    "BrokerFailedError",
    "BrokerLockedError",
    "Capabilities",
    "CapacityError",
    "Clock",
    "CorruptLogError",
    "Deliveries",
    "DiskFullError",
    "DuplicateJobError",
    "Duration",
    "ForkedBrokerError",
    "FormatError",
    "Health",
    "Histogram",
    "Job",
    "JobError",
    "JobId",
    "JobNotFoundError",
    "JobState",
    "Lease",
    "LeaseLike",
    "LeaseLostError",
    "LeaseRef",
    "QueueConfig",
    "QueueFullError",
    "QueueStats",
    "RateLimit",
    "RateLimitedError",
    "RetryPolicy",
    "RivetQError",
    "StorageError",
    "SystemClock",
    "Transaction",
    "UsageError",
    "Waiting",
]
