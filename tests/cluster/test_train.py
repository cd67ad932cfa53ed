"""Training jobs that fail on a real Ray cluster; tests/jobs/test_end_to_end.py has those that end well."""

from collections.abc import Callable

import pytest

from tests.cluster.conftest import Job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_once_with_the_reason(start_job: Callable[..., Job]) -> None:
    job = start_job("--optimizer.name", "sgd", "--optimizer.learning_rate", "1e25")
    printed = job.wait()
    assert job.process.returncode == 1
    assert "the loss is not finite by step" in printed
    assert "Traceback" not in printed
    assert [record["event"] for record in job.records()].count("start") == 1
