"""What the demo records of the guest's console: whole lines only, wherever the stream is cut."""

import pytest

from demo.story import Story

TEXT = (
    "edgehold-job calibrated work_ms=10.019 iterations=7\r\n"
    "edgehold-job n=1 release_ms=100.000 response_ms=10.136\r\n"
    "edgehold-job n=2 release_ms=200.000 response_ms=1204.5\r\n"
)


@pytest.mark.parametrize("cut", range(len(TEXT)))
def test_a_stream_that_is_cut_anywhere_gives_the_same_jobs(cut: int) -> None:
    story = Story(0)
    story.add_console(TEXT[:cut], 1)
    story.add_console(TEXT[cut:], 2)
    assert [(job.number, job.response_ms) for job in story.jobs] == [(1, 10.136), (2, 1204.5)]
    assert story.work_ms == 10.019
