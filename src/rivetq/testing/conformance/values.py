"""What the values are: frozen, picklable, plain."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

import pickle

import pytest

from rivetq import Broker

from .shared import _JOB_FIELDS, _LEASE_FIELDS, _fields, _job, _lease_new


def test_leases_and_jobs_are_frozen(broker: Broker) -> None:
    lease = _lease_new(broker)
    for value, fields in ((lease, _LEASE_FIELDS), (_job(broker, lease.id), _JOB_FIELDS)):
        before = _fields(value, fields)
        for field in fields:
            with pytest.raises(AttributeError):
                setattr(value, field, None)
        assert _fields(value, fields) == before


def test_a_pickled_lease_says_the_same_and_can_be_answered(broker: Broker) -> None:
    lease = _lease_new(broker, headers={"h": "1"})
    copy = pickle.loads(pickle.dumps(lease))
    assert _fields(copy, _LEASE_FIELDS) == _fields(lease, _LEASE_FIELDS)
    broker.ack(copy)
    assert broker.get(lease.id) is None


def test_a_pickled_job_says_the_same(broker: Broker) -> None:
    job = _job(broker, broker.enqueue("q", {"a": 1}, headers={"h": "1"}, delay=100))
    copy = pickle.loads(pickle.dumps(job))
    assert _fields(copy, _JOB_FIELDS) == _fields(job, _JOB_FIELDS)
    assert copy.json() == {"a": 1}


def test_a_state_is_a_str(broker: Broker) -> None:
    job = _job(broker, broker.enqueue("q", b""))
    assert isinstance(job.state, str)
    assert str(job.state) == f"{job.state}" == "ready"
    assert [each.id for each in broker.jobs("q", state=job.state)] == [job.id]
