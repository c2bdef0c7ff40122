"""A call for many leases, some of which may be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rivetq import LeaseLostError

from ..tasks.running import Delivery


def in_parts(deliveries: Sequence[Delivery], call: Callable[[list[Delivery]], None], lost: list[Delivery]) -> None:
    """Call with all of them, in as few parts as it takes to leave out those whose leases are lost.

    Behind a lost one the parts begin small and grow: the cost is in proportion to how many are lost, if all are, too.
    """
    at, size = 0, len(deliveries)
    while at < len(deliveries):
        part = list(deliveries[at : at + size])
        try:
            call(part)
        except LeaseLostError as error:
            place = [delivery.lease.token for delivery in part].index(error.token)
            if place:
                size = place
            else:
                lost.append(part[0])
                at, size = at + 1, 1
        else:
            at, size = at + len(part), 2 * len(part)
