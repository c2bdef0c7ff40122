"""The testing kit for users of RivetQ: a clock that moves when you say so, pytest fixtures, the contract suite.

The fixtures `rivetq_clock` and `rivetq_broker` come with the pytest plugin, which is loaded by itself where RivetQ is
installed. `rivetq.testing.conformance` is what every engine must pass.
"""

from .clock import ManualClock

__all__ = ["ManualClock"]
