"""When a task runs by itself, and what enqueues it then."""

from .scheduler import Scheduler
from .when import SCHEDULES, TICK_HEADER, Cron, Every, Misfire, Schedule, Spec, every

__all__ = ["SCHEDULES", "TICK_HEADER", "Cron", "Every", "Misfire", "Schedule", "Scheduler", "Spec", "every"]
