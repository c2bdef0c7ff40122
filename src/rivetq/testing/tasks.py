"""An app under test: its jobs in memory, its time by hand, its tasks run when the test says so. See `App.testing`."""

from ..tasks.under_test import Drained, EnqueuedCall, TestingApp

__all__ = ["Drained", "EnqueuedCall", "TestingApp"]
