"""The registry's lock holds against threads, slow contenders and dead holders."""

import threading
import time

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tla_service.errors import UnavailableError
from tla_service.registry import lock
from tla_service.registry.lock import RegistryLock, registry_lock
from tla_service.tracking.connection import client


def names(uri: str) -> list[str]:
    return [model.name for model in MlflowClient(uri).search_registered_models()]


def test_one_at_a_time(local_uri: str) -> None:
    inside, most, total = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, total
        with registry_lock(client(local_uri), "x") as held:
            inside += 1
            most = max(most, inside)
            before = total
            time.sleep(0.01)
            assert held is not None
            held.check()
            total = before + 1
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, total) == (1, 4)
    assert names(local_uri) == ["x-lock-00000004"]


def test_different_names_do_not_wait_for_each_other(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_TIMEOUT_SECONDS", 0.5)
    made = client(local_uri)
    with registry_lock(made, "x"), registry_lock(made, "x-lock"), registry_lock(made, "y"):
        pass


@pytest.mark.parametrize("name", ["o'brien", "a'b\"c", "100%", "a\\b", "a_b"])
def test_any_name_of_a_model_can_be_locked(local_uri: str, name: str) -> None:
    made = client(local_uri)
    for generation in (1, 2):
        with registry_lock(made, name) as held:
            assert held is not None
            held.check()
            assert held.generation == generation


def test_a_dead_holder_is_passed_over_and_finds_out(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(local_uri)
    dead = RegistryLock(made, "x")
    assert dead.acquire(lambda: True)
    dead.check()
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.6)
    began = time.monotonic()
    with registry_lock(made, "x") as held:
        assert time.monotonic() - began > 0.6
        assert held.generation == 2
        with pytest.raises(UnavailableError, match="lock was lost"):
            dead.check()


def test_a_check_survives_a_busy_server(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(local_uri)
    with registry_lock(made, "x") as held:
        search, busy = made.search_registered_models, [MlflowException("busy")]

        def search_when_free(**arguments: object) -> object:
            if busy:
                raise busy.pop()
            return search(**arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(made, "search_registered_models", search_when_free)
        held.check()
        assert not busy


def test_a_holder_that_took_too_long_stops_before_the_next_write(
    local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    with registry_lock(client(local_uri), "x") as held:
        time.sleep(0.15)
        with pytest.raises(UnavailableError, match="give the same command again"):
            held.check()


def test_waiting_ends(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_TIMEOUT_SECONDS", 0.2)
    made = client(local_uri)
    with registry_lock(made, "x"):
        with pytest.raises(UnavailableError, match="other promotions held the lock"):
            with registry_lock(made, "x"):
                pass


def test_who_no_longer_wants_it_goes(local_uri: str) -> None:
    made = client(local_uri)
    with registry_lock(made, "x"):
        with registry_lock(made, "x", wanted=lambda: False) as other:
            assert other is None
    assert names(local_uri) == ["x-lock-00000001"]


def test_a_slow_contender_takes_back_a_generation_that_has_been_and_gone(local_uri: str) -> None:
    made = client(local_uri)
    for _ in range(2):
        with registry_lock(made, "x"):
            pass
    with registry_lock(made, "x") as held:
        assert not RegistryLock(made, "x").take(2), "it read generation 1 as the highest, long ago"
        held.check()
    assert names(local_uri) == ["x-lock-00000003"]


def test_a_success_whose_answer_was_lost_is_recognised(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(local_uri)
    create = made.create_registered_model

    def create_and_lose(*arguments: object, **others: object) -> None:
        create(*arguments, **others)  # type: ignore[arg-type]
        raise MlflowException("the connection was reset")

    monkeypatch.setattr(made, "create_registered_model", create_and_lose)
    assert RegistryLock(made, "x").take(1)
    assert not RegistryLock(made, "x").take(1)
