"""The engine: one thread that answers one job after the other, and a bounded queue before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from server.errors import ApiError, internal
from server.jobs import Failed, Job

QUEUE = 128  # jobs that may wait
RECENT = 16  # answers whose mean time says how long the queue takes


class Engine:
    """Answers jobs in a thread of its own, in the order in which they came.

    answer: answers one job, by `Job.put`; it ends early when the job is cancelled.
    """

    def __init__(self, answer: Callable[[Job], None], queue: int = QUEUE) -> None:
        self._answer, self._bound = answer, queue
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closing = False
        self._seconds: deque[float] = deque(maxlen=RECENT)  # of the last answers
        self._thread = threading.Thread(target=self._work, name="partinfer serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue, without the one that is being answered."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Put a job at the queue's end. Raises ApiError when it is full (429), and while the server stops (503)."""
        with self._changed:
            if self._closing:
                raise _stopping()
            if len(self._waiting) >= self._bound:
                raise ApiError(
                    f"{len(self._waiting)} requests are waiting already: try again later",
                    429,
                    kind="rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": str(self._retry_after())},
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end its answer after the current token."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.put(Failed(ApiError("cancelled", 499, code="cancelled")))

    def close(self) -> None:
        """Answer nothing more: jobs that wait fail, and the answer in progress ends after its current token."""
        with self._changed:
            self._closing = True
            waiting, running = list(self._waiting), self._running
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.put(Failed(_stopping()))
        if running is not None:
            running.put(Failed(_stopping()))
            running.cancel()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def took(self, seconds: float) -> None:
        """Remember how long an answer took."""
        self._seconds.append(seconds)

    def _retry_after(self) -> int:
        """Seconds, at least 1, until a good part of the queue is done."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1, min(60, round(mean * (len(self._waiting) + 1) / 2)))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            except ApiError as error:
                job.put(Failed(error))
            except BaseException as error:  # failures of the tokenizers library are not Exceptions
                job.put(Failed(internal(error)))

    def _next(self) -> Job | None:
        """The next job; None when the engine is closed."""
        with self._changed:
            self._running = None
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            self._running = self._waiting.popleft()
            return self._running


def _stopping() -> ApiError:
    return ApiError("the server is stopping", 503, kind="server_error", code="stopping")
