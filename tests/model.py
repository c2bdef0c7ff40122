"""What RivetQ promises, said once more in the plainest Python: dicts, scans and sorted().

The model knows the public contract and nothing of the implementation: no log, no index, no heap, no threads.

- Time is whole milliseconds and moves only in `advance`. Whatever is due has happened when a method returns.
- A method that the contract forbids raises `RefusedError` and has changed nothing.
- What the contract leaves to the broker (ids, tokens, the jitter of a wait) is told to the model, which checks that it
  is allowed, and goes on with it.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import inf


class RefusedError(Exception):
    """The contract says no. `errors`: the name of each error that may say so -> the facts that it carries."""

    def __init__(self, errors):
        super().__init__(errors)
        self.errors = errors


@dataclass(frozen=True)
class Policy:
    max_attempts: int | None = 5
    base_ms: int = 1000
    factor: int = 2
    max_delay_ms: int = 3_600_000
    jitter: str = "full"

    def wait_ms(self, n):
        """The shortest and the longest wait before the nth retry."""
        d = min(self.max_delay_ms, self.base_ms * self.factor ** (n - 1))
        return {"none": (d, d), "equal": (d // 2, d), "full": (0, d)}[self.jitter]


@dataclass(frozen=True)
class Rate:
    per_second: int | float
    burst: int
    on: str = "lease"


@dataclass
class Queue:
    retry: Policy = field(default_factory=Policy)
    rate: Rate | None = None
    visibility_ms: int = 30_000
    max_jobs: int | None = None
    ttl_ms: int = 86_400_000
    paused: bool = False
    tokens: Fraction = Fraction(0)  # in the bucket at `tokens_at_ms`
    tokens_at_ms: int = 0
    totals: Counter = field(default_factory=Counter)


@dataclass
class Job:
    id: int
    queue: str
    payload: object
    headers: dict
    priority: int
    max_attempts: int | None
    retry: Policy
    visibility_ms: int | None
    key: str | None
    enqueued_at_ms: int
    due_at_ms: int
    due_by_ms: int  # later than `due_at_ms` while the broker's choice (jitter) is not known yet
    state: str = "scheduled"
    attempts: int = 0
    token: int = 0
    deadline_ms: int = 0
    last_error: str | None = None
    died_at_ms: int | None = None


class Model:
    def __init__(self, now_ms):
        self.now_ms = now_ms
        self.last_id = 0
        self._queues = {}  # name -> Queue
        self._jobs = {}  # id -> Job, the living, dead letters included
        self._ended_keys = {}  # (queue, key) -> (id, the moment from which it means nothing)

    # -- time, and what a restart does

    def advance(self, ms):
        self.now_ms += ms
        self._let_due_happen()

    def reopen(self, *, release_on_open):
        """The broker was closed or died, and was opened again."""
        for queue in self._queues.values():
            self._fill(queue)
        for job in self._where(state="leased") if release_on_open else []:
            self._fail(job, self.now_ms, "owner gone", 0 if job.attempts == 1 else None)
        self._let_due_happen()

    def undecided(self):
        """The jobs whose due time the broker has drawn and the model does not know yet."""
        return [job.id for job in self._where(state="scheduled") if job.due_at_ms < job.due_by_ms]

    def decide(self, job_id, state, due_at_ms):
        """Take the broker's draw, if it is one that the policy allows."""
        job = self._jobs[job_id]
        due_at_ms = due_at_ms if state == "scheduled" else min(self.now_ms, job.due_by_ms)
        assert state in ("ready", "scheduled"), f"job {job_id}: waits for its retry, but is {state}"
        assert job.due_at_ms <= due_at_ms <= job.due_by_ms, f"job {job_id}: {due_at_ms} is not a draw of {job}"
        self._schedule(job, due_at_ms)
        self._let_due_happen()

    def _let_due_happen(self):
        for job in self._where(state="leased"):
            if job.deadline_ms <= self.now_ms:
                self._fail(job, job.deadline_ms, "lease expired")
        for job in self._where(state="scheduled"):
            if job.due_by_ms <= self.now_ms:
                job.state = "ready"

    # -- in

    def enqueue(self, name, entries, ids, *, priority=5, delay_ms=0, headers=None, max_attempts=None, retry=None,
                visibility_ms=None, on_duplicate="return", in_block=False):  # fmt: skip
        """One batch of (payload, key). `ids`: what the broker answered, None if it refused. Returns the ids due."""
        queue = self._queues.get(name, Queue())
        standing = {key: self.find(name, key) for _, key in entries if key is not None}
        taken = {key: job_id for key, job_id in standing.items() if job_id is not None}
        fresh = sum(key is None for _, key in entries) + len(standing) - len(taken)
        no = {} if in_block else self._limits(name, fresh, there=0)
        if taken and on_duplicate == "raise":
            key = next(key for _, key in entries if key in taken)
            no["DuplicateJobError"] = {"job_id": taken[key], "queue": name, "key": key}
        if no:
            raise RefusedError(no)
        assert ids is not None, "the broker refused what the model takes"
        self._queues[name] = queue
        if not in_block:
            self._take_tokens(queue, fresh, "enqueue")
        policy = retry or queue.retry
        due = []
        for (payload, key), job_id in zip(entries, ids, strict=True):
            if key in taken:
                due.append(taken[key])
                continue
            assert job_id > self.last_id, f"id {job_id} after {self.last_id}: ids must increase and are never reused"
            self.last_id = job_id
            queue.totals["enqueued"] += 1
            self._ended_keys.pop((name, key), None)
            self._jobs[job_id] = Job(
                id=job_id, queue=name, payload=payload, headers=dict(headers or {}), priority=priority,
                max_attempts=max_attempts or policy.max_attempts, retry=policy, visibility_ms=visibility_ms, key=key,
                enqueued_at_ms=self.now_ms, due_at_ms=self.now_ms + delay_ms, due_by_ms=self.now_ms + delay_ms,
            )  # fmt: skip
            due.append(job_id)
            taken |= {key: job_id} if key is not None else {}
        self._let_due_happen()
        return due

    def end_block(self, before):
        """A transaction is one change to what was there `before`: what it takes away makes room for what it puts in."""
        no = {}
        for name, queue in self._queues.items():
            fresh = queue.totals["enqueued"] - before.stats(name)["enqueued"]
            no |= {error: {} for error in self._limits(name, fresh, there=fresh)}
            self._take_tokens(queue, fresh, "enqueue")
        if "UsageError" in no:
            no["RateLimitedError"] = {}  # whether a block is a batch is not said
        if no:
            raise RefusedError(no)

    # -- out

    def lease(self, names, max_jobs, tokens, *, visibility_ms=None):
        """`tokens`: those that the broker gave, in its order. Returns copies of the jobs leased."""
        leased = []
        for name in names:
            queue = self._queues.get(name)
            if queue is None or queue.paused:
                continue
            ready = sorted(self._where(name, "ready"), key=lambda job: (-job.priority, job.id))
            ready = ready[: int(min(max_jobs - len(leased), self._tokens(queue, "lease")))]
            self._take_tokens(queue, len(ready), "lease")
            for job in ready:
                timeouts = (visibility_ms, job.visibility_ms, queue.visibility_ms)
                job.deadline_ms = self.now_ms + next(ms for ms in timeouts if ms is not None)
                job.state = "leased"
                job.attempts += 1
            leased += ready
        for job, token in zip(leased, tokens, strict=False):
            assert token > job.token, f"job {job.id}: token {token} after {job.token}"
            job.token = token
        return [replace(job) for job in leased]

    def holds(self, job_id, token):
        job = self._jobs.get(job_id)
        return job is not None and job.state == "leased" and job.token == token

    def ack(self, refs):
        for job in [self._held(*ref) for ref in refs]:
            self._end(job, "acked")

    def nack(self, ref, *, error=None, delay_ms=None):
        self._fail(self._held(*ref), self.now_ms, error, delay_ms)
        self._let_due_happen()

    def release(self, ref, *, delay_ms=0):
        job = self._held(*ref)
        job.attempts -= 1
        self._schedule(job, self.now_ms + delay_ms)
        self._let_due_happen()

    def reject(self, ref, *, error=None):
        self._bury(self._held(*ref), self.now_ms, error)

    def extend(self, ref, ms):
        job = self._held(*ref)
        job.deadline_ms = max(job.deadline_ms, self.now_ms + ms)
        return replace(job)

    # -- queues and dead letters

    def configure(self, name, **options):
        queue = self._queues.setdefault(name, Queue())
        new_limit = options.get("rate", queue.rate) != queue.rate  # to repeat the old one does not fill the bucket
        for option, value in options.items():
            setattr(queue, option, value)
        if new_limit:
            self._fill(queue)

    def pause(self, name, *, paused=True):
        if paused or name in self._queues:
            self.configure(name, paused=paused)

    def purge(self, name, state=None):
        doomed = [job for job in self._where(name, state) if job.state != "leased"]
        for job in doomed:
            self._end(job, "purged")
        return len(doomed)

    def cancel(self, job_id):
        job = self._jobs.get(job_id)
        if job is None or job.state == "leased":
            return False
        self._end(job, "cancelled")
        return True

    def redrive(self, name, *, job_ids=None, limit=None):
        dead = self._where(name, "dead")
        strangers = set(job_ids or ()) - {job.id for job in dead}
        if strangers:
            raise RefusedError({"JobNotFoundError": {"job_id": min(strangers)}})
        chosen = [job for job in dead if job_ids is None or job.id in job_ids][:limit]
        for job in chosen:
            job.attempts, job.died_at_ms = 0, None
            self._schedule(job, self.now_ms)
        self._let_due_happen()
        return len(chosen)

    # -- looking

    def queues(self):
        return sorted(self._queues)

    def find(self, name, key):
        for job in self._where(name):
            if job.key == key:
                return job.id
        job_id, until_ms = self._ended_keys.get((name, key), (None, 0))
        return job_id if self.now_ms < until_ms else None

    def jobs(self, name, *, state=None, after=0, limit=None):
        return [replace(job) for job in self._where(name, state) if job.id > after][:limit]

    def get(self, job_id):
        return replace(self._jobs[job_id]) if job_id in self._jobs else None

    def stats(self, name=None):
        jobs = self._where(name)
        queues = [queue for known, queue in self._queues.items() if name in (None, known)]
        seen = {state: sum(job.state == state for job in jobs) for state in ("ready", "scheduled", "leased", "dead")}
        for total in ("enqueued", "acked", "cancelled", "purged"):
            seen[total] = sum(queue.totals[total] for queue in queues)
        ages = [(self.now_ms - job.enqueued_at_ms) / 1000 for job in jobs if job.state == "ready"]
        return seen | {"oldest_age": max(ages, default=None)}

    # -- the parts

    def _where(self, name=None, state=None):
        """The living jobs, by id: a dict keeps the order in which they came."""
        return [job for job in self._jobs.values() if name in (None, job.queue) and state in (None, job.state)]

    def _limits(self, name, fresh, *, there):
        """The reasons against `fresh` jobs, of which some may be `there` already."""
        queue = self._queues.get(name, Queue())
        open_jobs = sum(job.state != "dead" for job in self._where(name)) - there
        no = {}
        if fresh and queue.max_jobs is not None and open_jobs + fresh > queue.max_jobs:
            no["QueueFullError"] = {"queue": name, "max_jobs": queue.max_jobs}
        missing = fresh - self._tokens(queue, "enqueue")
        if fresh and missing > 0:
            if fresh > queue.rate.burst:
                no["UsageError"] = {}
            else:
                no["RateLimitedError"] = {"queue": name, "retry_after": float(missing / queue.rate.per_second)}
        return no

    def _held(self, job_id, token):
        if not self.holds(job_id, token):
            raise RefusedError({"LeaseLostError": {"job_id": job_id, "token": token}})
        return self._jobs[job_id]

    def _schedule(self, job, due_at_ms, due_by_ms=None):
        job.state, job.due_at_ms = "scheduled", due_at_ms
        job.due_by_ms = due_at_ms if due_by_ms is None else due_by_ms

    def _fail(self, job, at_ms, error, delay_ms=None):
        if job.max_attempts is not None and job.attempts >= job.max_attempts:
            self._bury(job, at_ms, error)
            return
        soonest, latest = job.retry.wait_ms(job.attempts) if delay_ms is None else (delay_ms, delay_ms)
        job.last_error = error
        self._schedule(job, at_ms + soonest, at_ms + latest)

    def _bury(self, job, at_ms, error):
        job.state, job.last_error, job.died_at_ms = "dead", error, at_ms

    def _end(self, job, how):
        queue = self._queues[job.queue]
        queue.totals[how] += 1
        del self._jobs[job.id]
        if job.key is not None and how == "acked":  # else nobody did the work: the key is free
            self._ended_keys[job.queue, job.key] = (job.id, self.now_ms + queue.ttl_ms)

    def _fill(self, queue):
        queue.tokens, queue.tokens_at_ms = Fraction(queue.rate.burst if queue.rate else 0), self.now_ms

    def _tokens(self, queue, on):
        if queue.rate is None or queue.rate.on != on:
            return inf
        earned = Fraction(queue.rate.per_second) * (self.now_ms - queue.tokens_at_ms) / 1000
        return min(Fraction(queue.rate.burst), queue.tokens + earned)

    def _take_tokens(self, queue, n, on):
        if queue.rate is not None and queue.rate.on == on:
            queue.tokens, queue.tokens_at_ms = self._tokens(queue, on) - n, self.now_ms
