"""A real broker and the model of the contract (model.py), driven side by side: after each step they look the same.

RIVETQ_EXAMPLES raises the number of examples. A failure prints the calls that lead to it, and a blob that repeats it.
"""

import copy
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from inside import inside, shrink_runs
from model import Model, Policy, Rate, RefusedError

import rivetq.engines.checkpoint
import rivetq.engines.local
from rivetq import Broker, LeaseRef, RateLimit, RetryPolicy, RivetQError, UsageError
from rivetq.testing import ManualClock

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MS = timedelta(milliseconds=1)

QUEUES = ("mail", "büro/2", "c")
NOBODYS = "nobody made this"
KEYS = ("k1", "k2")
STATES = ("ready", "scheduled", "leased", "dead")
TOTALS = ("enqueued", "acked", "cancelled", "purged")
SAME_IN_BOTH = ("id", "queue", "priority", "max_attempts", "last_error")


class LargePayload(bytes):
    """Prints short in a failing example."""

    def __repr__(self):
        return f"LargePayload({self[:1]!r} * {len(self)})"


# -- what the rules draw. Few names and few values, so that things collide.

queues = st.sampled_from(("mail", "mail", *QUEUES))
preferences = st.permutations(QUEUES).flatmap(lambda names: st.integers(1, 3).map(lambda n: list(names)[:n]))
picks = st.integers(0, 11)  # "the nth of those there are"
keys = st.sampled_from((None, None, *KEYS))
payloads = st.one_of(
    st.sampled_from((b"", b"\x00\xff")),
    st.builds(lambda: LargePayload(b"x" * 20_000)),  # a few of them fill a segment
    st.binary(min_size=1, max_size=6).filter(lambda payload: payload[:1] != b"{"),
    st.fixed_dictionaries({"n": st.integers(0, 3), "s": st.sampled_from(("", "ü", '"'))}),
)
batches = st.lists(st.tuples(payloads, keys), min_size=1, max_size=5)
delays = st.sampled_from((0, 0, 0, 1, 250, 1000, 10_000))
waits = st.sampled_from((None, None, *(0, 250, 2000)))
timeouts = st.sampled_from((None, None, None, 1000, 5000, 100_000))
errors = st.sampled_from((None, "boom", "ünlucky\n"))
exact = st.builds(
    Policy,
    max_attempts=st.sampled_from((1, 2, 3, None)),
    base_ms=st.sampled_from((0, 500, 1000)),
    factor=st.sampled_from((1, 2, 3)),
    max_delay_ms=st.sampled_from((1500, 3_600_000)),
    jitter=st.just("none"),
)
jittered = st.builds(Policy, base_ms=st.sampled_from((500, 4000)), jitter=st.sampled_from(("full", "equal")))
policies = st.one_of(exact, exact, exact, jittered)
rates = st.builds(
    Rate, per_second=st.sampled_from((0.5, 1, 4)), burst=st.integers(1, 3), on=st.sampled_from(("lease", "enqueue"))
)
enqueue_options = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 9),
        "delay_ms": delays,
        "headers": st.sampled_from(({}, {"trace": "1", "ü": ""})),
        "max_attempts": st.integers(1, 3),
        "retry": policies,
        "visibility_ms": timeouts,
    },
)
on_duplicate = st.sampled_from(("return", "return", "return", "raise"))
queue_options = st.fixed_dictionaries(
    {},
    optional={
        "retry": policies,
        "rate": st.one_of(st.none(), rates),
        "visibility_ms": st.sampled_from((1000, 30_000)),
        "max_jobs": st.sampled_from((None, None, 2, 5, 8)),
        "ttl_ms": st.sampled_from((0, 1000, 60_000, 86_400_000)),
    },
)
passing = st.sampled_from((1, 249, 250, 500, 500, 1000, 1000, 1000, 2500, 2500, 10_000, 30_000, 3_600_000, 86_400_000))
endings = st.sampled_from(("ack", "nack", "nack", "release", "reject", "keep", "keep"))
damages = st.tuples(
    st.sampled_from(("kept", "kept", "lost", "rotten")), picks, st.floats(0, 1, exclude_max=True), st.integers(0, 7)
)
tx_steps = st.lists(
    st.one_of(
        st.tuples(st.just("enqueue"), queues, payloads, keys, enqueue_options),
        st.tuples(st.just("enqueue_many"), queues, batches),
        st.tuples(st.sampled_from(("ack", "ack_many", "release", "reject", "nack")), picks, delays, errors),
    ),
    min_size=1,
    max_size=4,
)


class ChangeOfMindError(Exception):
    pass


class BrokerBesideModel(RuleBasedStateMachine):
    """The rules that need no files. `path` and what survives are the business of the subclass."""

    path = ":memory:"

    def __init__(self):
        super().__init__()
        self.clock = ManualClock(start=START)
        self.model = Model(now_ms=in_ms(START))
        self.leases = {}  # (id, token) -> the last Lease value: the live ones, and the lost and settled ones
        self.configs = {}  # queue -> the QueueConfig that was answered last
        self.default_config = None
        self.broker = self.open()
        self.default_config = self.broker.configure_queue(QUEUES[0])

    def open(self, **options):
        return Broker(self.path, clock=self.clock, **options)

    def teardown(self):
        self.broker.close()

    # -- put work in

    @rule(
        queue=queues,
        payload=payloads,
        key=keys,
        options=enqueue_options,
        on_duplicate=on_duplicate,
        when=st.sampled_from(("delay", "eta", "epoch")),
    )
    def enqueue(self, queue, payload, key, options, on_duplicate, when):
        arguments = as_arguments(options)
        if when != "delay":
            arguments.pop("delay", None)
            eta = EPOCH + (self.model.now_ms + options.get("delay_ms", -5000)) * MS  # one that has passed means now
            arguments["eta"] = eta if when == "eta" else eta.timestamp()
        self.agree(
            lambda: self.broker.enqueue(queue, payload, idempotency_key=key, on_duplicate=on_duplicate, **arguments),
            lambda new: self.model.enqueue(
                queue, [(payload, key)], None if new is None else [new], on_duplicate=on_duplicate, **options
            )[0],
        )

    @rule(
        queue=queues,
        entries=batches,
        options=enqueue_options,
        on_duplicate=on_duplicate,
    )
    def enqueue_many(self, queue, entries, options, on_duplicate):
        if on_duplicate == "raise":
            entries = [(payload, None) for payload, _ in entries[1:]] + [entries[0]]
        self.agree(
            lambda: list(
                self.broker.enqueue_many(
                    queue,
                    [payload for payload, _ in entries],
                    idempotency_keys=[key for _, key in entries],
                    on_duplicate=on_duplicate,
                    **as_arguments(options),
                )
            ),
            lambda new: self.model.enqueue(queue, entries, new, on_duplicate=on_duplicate, **options),
        )

    # -- take work out

    def ready(self):
        return self.model.stats()["ready"]

    def dead(self):
        return self.model.stats()["dead"]

    def jobs(self):
        return [job.id for job in self.model.jobs(None)]

    @precondition(ready)
    @rule(names=st.one_of(queues, preferences), timeout_ms=timeouts)
    def lease(self, names, timeout_ms):
        lease = self.broker.lease(names, visibility_timeout=in_seconds(timeout_ms))
        self.took([lease] if lease else [], names, 1, timeout_ms)

    @precondition(ready)
    @rule(names=st.one_of(queues, preferences), max_jobs=st.integers(1, 5), timeout_ms=timeouts)
    def lease_many(self, names, max_jobs, timeout_ms):
        leases = self.broker.lease_many(names, max_jobs, visibility_timeout=in_seconds(timeout_ms))
        self.took(leases, names, max_jobs, timeout_ms)

    @precondition(ready)
    @rule(names=st.permutations(QUEUES), verbs=st.lists(endings, min_size=1, max_size=4), error=errors)
    def work(self, names, verbs, error):
        """Lease some jobs from wherever there are any, and settle some of them at once."""
        leases = self.broker.lease_many(names, len(verbs))
        self.took(leases, names, len(verbs), None)
        for lease, verb in zip(leases, verbs, strict=False):
            if verb != "keep":
                self.answer(verb, lease, **answer_options(verb, 0, error))

    def took(self, leases, names, max_jobs, timeout_ms):
        names = [names] if isinstance(names, str) else names
        expected = self.model.lease(names, max_jobs, [lease.token for lease in leases], visibility_ms=timeout_ms)
        assert [of_lease(lease) for lease in leases] == [of_model_lease(job) for job in expected]
        self.leases |= {(lease.id, lease.token): lease for lease in leases}

    def live(self):
        return [lease for ref, lease in self.leases.items() if self.model.holds(*ref)]

    def lost(self):
        return [lease for ref, lease in self.leases.items() if not self.model.holds(*ref)]

    @precondition(live)
    @rule(pick=picks, by_reference=st.booleans())
    def ack(self, pick, by_reference):
        lease = nth(self.live(), pick)
        self.answer("ack", LeaseRef(lease.id, lease.token) if by_reference else lease)

    @precondition(live)
    @rule(chosen=st.sets(picks, min_size=1, max_size=4))
    def ack_many(self, chosen):
        leases = {id(lease): lease for lease in (nth(self.live(), pick) for pick in chosen)}
        self.answer_many(list(leases.values()))

    @precondition(live)
    @rule(pick=picks, error=errors, delay_ms=waits)
    def nack(self, pick, error, delay_ms):
        self.answer("nack", nth(self.live(), pick), error=error, delay_ms=delay_ms)

    @precondition(live)
    @rule(pick=picks, delay_ms=delays)
    def release(self, pick, delay_ms):
        self.answer("release", nth(self.live(), pick), delay_ms=delay_ms)

    @precondition(live)
    @rule(pick=picks, error=errors)
    def reject(self, pick, error):
        self.answer("reject", nth(self.live(), pick), error=error)

    @precondition(live)
    @rule(pick=picks, ms=st.sampled_from((0, 1, 1000, 60_000)))
    def extend(self, pick, ms):
        self.prolong(nth(self.live(), pick), ms)

    @precondition(lost)
    @rule(
        pick=picks,
        verb=st.sampled_from(("ack", "nack", "release", "reject", "extend", "ack_many")),
        what=st.sampled_from(("as it was", "as it was", "next token", "next id")),
    )
    def a_stale_answer_changes_nothing(self, pick, verb, what):
        lease = nth(self.lost(), pick)
        stale = {
            "as it was": lease,
            "next token": LeaseRef(lease.id, lease.token + 1_000_000),
            "next id": LeaseRef(self.model.last_id + 1, lease.token),
        }[what]
        before = copy.deepcopy(self.model)
        if verb == "extend":
            self.prolong(stale, 1000)
        elif verb == "ack_many":
            self.answer_many([*self.live()[:2], stale])
        else:
            self.answer(verb, stale)
        assert vars(self.model) == vars(before)

    def answer(self, verb, lease, **options):
        self.agree(
            lambda: getattr(self.broker, verb)(lease, **as_arguments(options)),
            lambda _: answer_model(self.model, verb, lease, options),
        )

    def answer_many(self, leases):
        self.agree(
            lambda: self.broker.ack_many(leases),
            lambda _: self.model.ack([(lease.id, lease.token) for lease in leases]),
        )

    def prolong(self, lease, ms):
        def extend():
            longer = self.broker.extend(lease, in_seconds(ms))
            self.leases[longer.id, longer.token] = longer
            return of_lease(longer)

        self.agree(extend, lambda _: of_model_lease(self.model.extend((lease.id, lease.token), ms)))

    # -- all or nothing

    @rule(steps=tx_steps, change_of_mind=st.sampled_from((False, False, False, True)))
    def transaction(self, steps, change_of_mind):
        leases = self.live() + self.lost()[-1:]  # one lost lease may slip in, and undoes the block
        trial = copy.deepcopy(self.model)
        answers = []
        error = None
        try:
            with self.broker.transaction() as tx:
                for step in steps:
                    answers += [do_in_transaction(tx, step, leases)]
                if change_of_mind:
                    raise ChangeOfMindError
        except (RivetQError, ChangeOfMindError) as caught:
            error = caught
        with pytest.raises(UsageError):
            tx.enqueue(QUEUES[0], b"late")

        # What was drawn is gone for good, also if the block came to nothing.
        drawn = [job_id for answer in answers if answer for job_id in answer]
        self.model.last_id = max((self.model.last_id, *drawn))
        if isinstance(error, ChangeOfMindError):
            return
        self.agree(lambda: raise_or_return(error), lambda _: replay_in_model(trial, steps, leases, answers))
        if error is None:
            self.model = trial

    @precondition(live)
    @rule(pick=picks, queue=queues, payload=payloads)
    def a_transaction_that_is_overtaken_does_nothing(self, pick, queue, payload):
        """The fence holds at the call, and no longer at the end of the block."""
        lease = nth(self.live(), pick)
        drawn = []

        def overtaken():
            with self.broker.transaction() as tx:
                tx.ack(lease)
                if self.may_enqueue(queue):
                    drawn.append(tx.enqueue(queue, payload))
                self.answer("release", lease, delay_ms=0)

        self.agree(overtaken, lambda _: self.model.ack([(lease.id, lease.token)]))
        self.model.last_id = max((self.model.last_id, *drawn))

    def may_enqueue(self, queue):
        try:
            copy.deepcopy(self.model).enqueue(queue, [(b"", None)], [self.model.last_id + 1])
        except RefusedError:
            return False
        return True

    # -- queues and dead letters

    @initialize(
        options=st.tuples(*[queue_options] * 2), batch=batches, failures=st.integers(0, 2), delivered=st.integers(0, 3)
    )
    def start_with_some_work(self, options, batch, failures, delivered):
        for queue, chosen in zip(QUEUES, options, strict=False):
            self.configure_queue(queue, chosen)
            self.enqueue_many(queue, batch, {}, "return")
        for _ in range(failures if delivered else 0):
            self.lease_many(QUEUES, delivered, None)
            for lease in self.live():
                self.answer("nack", lease, error="failed before", delay_ms=0)
        if delivered:
            self.lease_many(QUEUES, delivered, None)

    @rule(queue=queues, options=queue_options)
    def configure_queue(self, queue, options):
        if not options:
            return
        self.model.configure(queue, **options)
        self.configs[queue] = self.broker.configure_queue(queue, **as_arguments(options))

    @rule(queue=queues, verb=st.sampled_from(("pause", "resume", "resume", "resume")))
    def pause_or_resume(self, queue, verb):
        getattr(self.broker, verb)(queue)
        self.model.pause(queue, paused=verb == "pause")

    @precondition(jobs)
    @rule(queue=queues, state=st.sampled_from((None, "ready", "scheduled", "scheduled", "dead", "dead")))
    def purge(self, queue, state):
        assert self.broker.purge(queue, state=state) == self.model.purge(queue, state)

    @precondition(jobs)
    @rule(pick=picks)
    def cancel(self, pick):
        job_id = nth([*self.jobs(), self.model.last_id + 1], pick)
        assert self.broker.cancel(job_id) is self.model.cancel(job_id)

    @precondition(dead)
    @rule(
        queue=queues,
        chosen=st.one_of(st.none(), st.sets(picks, max_size=4)),
        strange=st.one_of(st.none(), st.none(), picks),
        limit=st.sampled_from((None, None, 1, 2)),
    )
    def redrive(self, queue, chosen, strange, limit):
        dead = [job.id for job in self.model.jobs(queue, state="dead")]
        job_ids = None if chosen is None else sorted({nth(dead, pick) for pick in chosen if dead}, reverse=True)
        if job_ids is not None and strange is not None:
            others = [job_id for job_id in self.jobs() if job_id not in dead]
            job_ids.append(nth([*others, self.model.last_id + 1], strange))
        self.agree(
            lambda: self.broker.redrive(queue, job_ids=job_ids, limit=limit),
            lambda _: self.model.redrive(queue, job_ids=job_ids, limit=limit),
        )

    # -- time and looking

    @rule(ms=passing)
    def time_passes(self, ms):
        self.clock.advance(in_seconds(ms))
        self.model.advance(ms)

    @rule(
        queue=st.sampled_from((*QUEUES, NOBODYS)),
        state=st.sampled_from((None, *STATES)),
        after=picks,
        limit=st.integers(1, 3),
    )
    def look(self, queue, state, after, limit):
        page = self.broker.jobs(queue, state=state, after=after, limit=limit)
        expected = self.model.jobs(queue, state=state, after=after, limit=limit)
        assert [of_job(job) for job in page] == [of_model_job(job) for job in expected]
        dead = self.broker.dead_letters(queue, after=after, limit=limit)
        expected = self.model.jobs(queue, state="dead", after=after, limit=limit)
        assert [of_job(job) for job in dead] == [of_model_job(job) for job in expected]
        job, expected = self.broker.get(after + 1), self.model.get(after + 1)
        assert (job and of_job(job)) == (expected and of_model_job(expected))
        if queue == NOBODYS:
            assert self.broker.lease(queue) is None
            assert self.broker.lease_many([queue], 3) == []
            assert self.broker.purge(queue) == self.broker.redrive(queue) == 0
            assert self.broker.find(queue, KEYS[0]) is None
            assert of_stats(self.broker.stats(queue)) == self.model.stats(queue)

    # -- the judge

    @invariant()
    def they_look_the_same(self):
        inside(self.broker).audit()
        for job_id in self.model.undecided():
            job = self.broker.get(job_id)
            assert job is not None, f"job {job_id} is gone"
            self.model.decide(job_id, str(job.state), in_ms(job.due_at) if job.state == "scheduled" else None)
        assert sorted(self.broker.queues()) == self.model.queues()
        for queue in QUEUES:
            listed = [of_job(job) for job in self.broker.jobs(queue, limit=10_000)]
            assert listed == [of_model_job(job) for job in self.model.jobs(queue)]
            stats = of_stats(self.broker.stats(queue))
            assert stats == self.model.stats(queue)
            assert stats["enqueued"] == sum(stats[field] for field in (*STATES, *TOTALS[1:]))
            for key in KEYS:
                assert self.broker.find(queue, key) == self.model.find(queue, key), f"{queue}: {key}"
            assert self.broker.configure_queue(queue) == self.configs.get(queue, self.default_config)
        assert of_stats(self.broker.stats()) == self.model.stats()

    def agree(self, real, model):
        """Both give the same answer, or refuse for the same reason. `model` gets the answer, None if there is none."""
        try:
            answer = real()
        except RivetQError as error:
            try:
                model(None)
            except RefusedError as refused:
                check_refusal(error, refused)
            else:
                raise AssertionError(f"the broker refused what the model takes: {error!r}") from error
        else:
            assert answer == model(answer)


class BrokerOnDiskBesideModel(BrokerBesideModel):
    """All of it, and what happens to a directory."""

    def __init__(self):
        self.base = Path(tempfile.mkdtemp(prefix="rivetq-model-"))
        self.generation = 0
        super().__init__()

    @property
    def path(self):
        return self.base / str(self.generation)

    def open(self, **options):
        return super().open(segment_bytes=64 * 1024, fsync="never", **options)

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.base)

    @rule(crashed=st.booleans(), index=damages, downtime_ms=st.sampled_from((0, 1000, 60_000)), keep=st.booleans())
    def close_or_crash_and_reopen(self, crashed, index, downtime_ms, keep):
        if crashed:
            self.crash()
        else:
            self.broker.close()
        damage_index(self.path / "index", *index)
        if downtime_ms:
            self.clock.advance(in_seconds(downtime_ms))
            self.model.advance(downtime_ms)
        self.broker = self.open(release_on_open=not keep)
        self.model.reopen(release_on_open=not keep)

    @precondition(BrokerBesideModel.live)
    @rule(crashed=st.booleans(), index=damages)
    def end_the_owner_at_work(self, crashed, index):
        self.close_or_crash_and_reopen(crashed, index, downtime_ms=0, keep=False)

    @precondition(BrokerBesideModel.jobs)
    @rule(verb=st.sampled_from(("checkpoint", "compact", "rotate", "sync")))
    def maintain(self, verb):
        getattr(self.broker, verb)()

    def crash(self):
        """Leave the bytes that a killed process leaves: all that it handed to the operating system."""
        scene = self.path
        self.generation += 1
        copy_at_rest(scene, self.path)
        self.broker.close()
        shutil.rmtree(scene)


# -- both sides in the same words


def in_ms(moment):
    """Whole milliseconds since the epoch, of an aware datetime in UTC."""
    assert moment.utcoffset() == timedelta(0), f"{moment!r} is not in UTC"
    ms, rest = divmod(moment - EPOCH, MS)
    assert not rest, f"{moment!r} is not a whole millisecond"
    return ms


def in_seconds(ms):
    if ms is None:
        return None
    return ms // 1000 if ms % 1000 == 0 else ms / 1000


def as_policy(policy):
    return RetryPolicy(
        max_attempts=policy.max_attempts,
        base=in_seconds(policy.base_ms),
        factor=policy.factor,
        max_delay=in_seconds(policy.max_delay_ms),
        jitter=policy.jitter,
    )


def as_rate(rate):
    return rate and RateLimit(rate.per_second, rate.burst, on=rate.on)


# The model's option -> the broker's, and how to say its value there.
ARGUMENTS = {
    "delay_ms": ("delay", in_seconds),
    "visibility_ms": ("visibility_timeout", in_seconds),
    "ttl_ms": ("idempotency_ttl", in_seconds),
    "retry": ("retry", as_policy),
    "rate": ("rate_limit", as_rate),
}


def as_arguments(options):
    said = {}
    for option, value in options.items():
        name, convert = ARGUMENTS.get(option, (option, lambda value: value))
        said[name] = convert(value)
    return said


def of_payload(payload):
    """What was enqueued: no payload of ours that is bytes begins like a JSON object."""
    assert isinstance(payload, bytes)
    return json.loads(payload) if payload[:1] == b"{" else payload


def of_real(real):
    seen = {name: getattr(real, name) for name in SAME_IN_BOTH}
    seen |= {"payload": of_payload(real.payload), "headers": dict(real.headers)}
    return seen | {"enqueued_at_ms": in_ms(real.enqueued_at)}


def of_model(job):
    return {name: getattr(job, name) for name in (*SAME_IN_BOTH, "payload", "headers", "enqueued_at_ms")}


def of_job(job):
    return of_real(job) | {
        "state": str(job.state),
        "attempts": job.attempts,
        "due_at_ms": in_ms(job.due_at) if job.state == "scheduled" else None,
        "died_at_ms": job.died_at and in_ms(job.died_at),
    }


def of_model_job(job):
    return of_model(job) | {
        "state": job.state,
        "attempts": job.attempts,
        "due_at_ms": job.due_at_ms if job.state == "scheduled" else None,
        "died_at_ms": job.died_at_ms,
    }


def of_lease(lease):
    seen = {"attempts": lease.attempt, "token": lease.token, "deadline_ms": in_ms(lease.deadline)}
    return of_real(lease) | seen


def of_model_lease(job):
    return of_model(job) | {"attempts": job.attempts, "token": job.token, "deadline_ms": job.deadline_ms}


def of_stats(stats):
    age = stats.oldest_age
    seen = {field: getattr(stats, field) for field in (*STATES, *TOTALS)}
    return seen | {"oldest_age": age if age is None else pytest.approx(age, abs=0.0015)}


def check_refusal(error, refused):
    name = type(error).__name__
    assert name in refused.errors, f"{error!r}, but the model says {refused}"
    assert error.outcome == "not_done"
    for fact, value in refused.errors[name].items():
        expected = pytest.approx(value, abs=0.0015) if isinstance(value, float) else value
        assert getattr(error, fact) == expected, f"{fact} of {error!r}"


# -- one step of a transaction, on either side


def do_in_transaction(tx, step, leases):
    """Returns the ids that the step was told, None if it is an answer."""
    match step:
        case ("enqueue", queue, payload, key, options):
            return [tx.enqueue(queue, payload, idempotency_key=key, **as_arguments(options))]
        case ("enqueue_many", queue, entries):
            keys = [key for _, key in entries]
            return list(tx.enqueue_many(queue, [payload for payload, _ in entries], idempotency_keys=keys))
        case (verb, pick, delay_ms, error) if leases:
            lease = nth(leases, pick)
            if verb == "ack_many":
                tx.ack_many([lease])
            else:
                getattr(tx, verb)(lease, **as_arguments(answer_options(verb, delay_ms, error)))
    return None


def replay_in_model(model, steps, leases, answers):
    """The steps of a block, one after another, and its end. Of several reasons to refuse it any one will do: some are
    looked for at the call, others at the end."""
    no = {}
    before = copy.deepcopy(model)
    answers = answers + [None] * (len(steps) - len(answers))  # a refusal ended the block early
    for step, ids in zip(steps, answers, strict=True):
        try:
            replay_step_in_model(model, step, leases, None if no else ids)
        except RefusedError as refused:
            no = both_reasons(no, refused.errors)
    try:
        model.end_block(before)
    except RefusedError as refused:
        no = both_reasons(no, refused.errors)
    if no:
        raise RefusedError(no)


def replay_step_in_model(model, step, leases, ids):
    match step:
        case ("enqueue", queue, payload, key, options):
            entries = [(payload, key)]
        case ("enqueue_many", queue, entries):
            options = {}
        case (verb, pick, delay_ms, error):
            if leases:
                verb = "ack" if verb == "ack_many" else verb
                answer_model(model, verb, nth(leases, pick), answer_options(verb, delay_ms, error))
            return
    invented = [model.last_id + 1 + n for n in range(len(entries))]  # when only the reasons matter any more
    due = model.enqueue(queue, entries, ids or invented, in_block=True, **options)
    assert ids in (None, due), f"{step}: {ids}, but the model says {due}"


def both_reasons(some, more):
    """Where they name the same error, its facts may be those of either."""
    return some | {name: facts if some.get(name, facts) == facts else {} for name, facts in more.items()}


def answer_options(verb, delay_ms, error):
    return {"nack": {"error": error}, "release": {"delay_ms": delay_ms}, "reject": {"error": error}}.get(verb, {})


def answer_model(model, verb, lease, options):
    ref = (lease.id, lease.token)
    if verb == "ack":
        model.ack([ref])
    else:
        getattr(model, verb)(ref, **options)


def raise_or_return(error):
    if error is not None:
        raise error


# -- small parts


def nth(things, pick):
    return things[pick % len(things)]


def copy_at_rest(source, target):
    """Copy a directory in which the broker's own threads may just be tidying: again, until nothing moved meanwhile."""
    while True:
        try:
            before = listing(source)
            shutil.copytree(source, target)
            if listing(source) == before:
                return
        except (FileNotFoundError, shutil.Error):
            pass  # a file went away between being listed and being read
        shutil.rmtree(target, ignore_errors=True)


def listing(directory):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")}


def keep_little_in_memory(monkeypatch, jobs_in_a_run):
    """The ways of a backlog of millions, with a handful of jobs."""
    shrink_runs(monkeypatch, jobs_in_a_run, few_jobs=1)
    monkeypatch.setattr(rivetq.engines.checkpoint, "RESIDENT_RUNS", 0)
    monkeypatch.setattr(rivetq.engines.checkpoint, "RUNS_READ", 0)
    monkeypatch.setattr(rivetq.engines.checkpoint, "LOOSE_SHARE", 2**30)
    new_machine = rivetq.engines.local.LocalEngine._new_machine

    def without_cache(engine):
        engine._cache_bytes = 0  # a run whose payloads are in memory stays there itself
        return new_machine(engine)

    monkeypatch.setattr(rivetq.engines.local.LocalEngine, "_new_machine", without_cache)


def damage_index(directory, how, pick, place, bit):
    if how == "lost":
        shutil.rmtree(directory, ignore_errors=True)  # it may not be there yet
    elif how == "rotten":
        files = sorted(file for file in directory.rglob("*") if file.is_file() and file.stat().st_size)
        if files:
            flip_bit(nth(files, pick), place, bit)


def flip_bit(file, place, bit):
    rotten = bytearray(file.read_bytes())
    rotten[int(place * len(rotten))] ^= 1 << bit
    file.write_bytes(rotten)


# -- the tests


def run(machine, examples):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(examples, int(os.environ.get("RIVETQ_EXAMPLES", "0"))),
            stateful_step_count=50,
            deadline=None,
            derandomize=False,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.parametrize("jobs_in_a_run", [None, 3], ids=["as it is", "tiny runs, nothing stays in memory"])
def test_the_broker_agrees_with_the_model_through_restarts_crashes_and_a_rotten_index(jobs_in_a_run, monkeypatch):
    if jobs_in_a_run:
        keep_little_in_memory(monkeypatch, jobs_in_a_run)
    run(BrokerOnDiskBesideModel, examples=110)  # CI: 200 (see the Makefile)


def test_the_broker_in_memory_agrees_with_the_model():
    run(BrokerBesideModel, examples=50)
