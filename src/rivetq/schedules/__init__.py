"""When a task runs by itself, and what enqueues it then."""

from .scheduler import SCHEDULES, TICK_HEADER, Cron, Every, Misfire, Schedule, Scheduler, Spec, every

__all__ = ["SCHEDULES", "TICK_HEADER", "Cron", "Every", "Misfire", "Schedule", "Scheduler", "Spec", "every"]
