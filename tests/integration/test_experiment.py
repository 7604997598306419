"""The experiment runs: real threads, a real deadlined, and what they say is enough to draw. Its bars are not tests."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgehold.clock import NS_PER_MS
from edgehold.kernel import procfs
from edgehold.testing.capability import need_root
from edgehold.testing.jobs import PeriodicJob
from edgehold.testing.load import eventually
from experiment import picture, report
from experiment.analysis import VARIANTS, Variant, summary
from experiment.run import PERIOD_MS, WORKS_MS, play

MS = NS_PER_MS


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]], ids=lambda one: one.key)
async def test_a_short_run_has_budgets_and_responses(variant: Variant, tmp_path: Path) -> None:
    need_root()
    run = await play(variant, 8.0, seconds=4)
    assert [thread.work_ns for thread in run.threads] == [work * MS for work in WORKS_MS]
    for thread in run.threads:
        steps = thread.budgets()
        assert steps[0][1] == 8 * MS
        assert max(budget for _, budget in steps) > 8 * MS
        assert max(budget for _, budget in steps) <= 80 * MS
        first = thread.jobs[0]
        assert [job.number for job in thread.jobs] == list(range(len(thread.jobs)))
        assert {job.release_ns - first.release_ns - job.number * PERIOD_MS * MS for job in thread.jobs} == {0}
        assert all(job.release_ns <= job.start_ns and job.executed_ns >= thread.work_ns for job in thread.jobs)
        assert not procfs.PROC.joinpath(str(thread.samples[0].tid)).exists()
    assert run.setattr_calls >= 4
    told = tuple(summary(run, thread) for thread in run.threads)
    pictures = picture.draw([run], tmp_path)
    page = report.write(tmp_path, runs=[run], summaries=[told], verdicts=[], facts={"a": "<b>"}, pictures=pictures)
    assert page.read_text().count("<svg") == 1
    assert "&lt;b&gt;" in page.read_text()
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


def test_a_late_job_keeps_its_release_and_its_work() -> None:
    with PeriodicJob(work_s=0.02, period_s=0.01) as one:
        eventually(lambda: len(one.jobs()) >= 5, timeout_s=30, what="five jobs have ended")
        jobs = one.jobs()
    assert [job.release_ns - jobs[0].release_ns for job in jobs] == [n * 10 * MS for n in range(len(jobs))]
    assert all(after.start_ns >= before.end_ns for before, after in itertools.pairwise(jobs))
    # Each takes twice the period, so that the backlog grows by a period a job at least.
    assert all(job.response_ns >= 20 * MS + job.number * 10 * MS for job in jobs)


def test_a_periodic_thread_ends_with_its_block() -> None:
    with PeriodicJob(work_s=0.001, period_s=0.01) as one:
        assert procfs.threads(one.tid) == [one.tid]
    assert not procfs.PROC.joinpath(str(one.tid)).exists()


def test_a_periodic_thread_ends_when_its_parent_was_killed() -> None:
    program = (
        "import time; from edgehold.testing.jobs import PeriodicJob\n"
        "with PeriodicJob(work_s=0.001, period_s=0.01) as one: print(one.tid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        fd = os.pidfd_open(orphan)
        try:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            eventually(lambda: _ended(orphan), timeout_s=30, what=f"process {orphan} has ended")
        finally:
            if not _ended(orphan):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)


def _ended(pid: int) -> bool:
    """A process that nobody has waited for yet has ended too."""
    try:
        return procfs.stat(pid).ended
    except procfs.GoneError:
        return True
