"""The testing kit for users of RivetQ: a clock that moves when you say so, pytest fixtures, the contract suite,
a disk whose power can be cut.

The fixtures `rivetq_clock` and `rivetq_broker` come with the pytest plugin, which is loaded by itself where RivetQ is
installed. `rivetq.testing.conformance` is what every engine must pass.
"""

from .clock import ManualClock
from .disk import PowerCut, SimulatedDisk

__all__ = ["ManualClock", "PowerCut", "SimulatedDisk"]
