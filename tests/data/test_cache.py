"""Files that are whole or absent, locks, tensors built once."""

import errno
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from tla_service.data import cache
from tla_service.errors import UnavailableError


def test_processes_that_start_together_build_once(tmp_path: Path, fork: Callable[..., ForkProcess]) -> None:
    def build() -> dict[str, torch.Tensor]:
        with (tmp_path / "log").open("a") as log:
            log.write("built\n")
        time.sleep(0.5)
        return {"images": torch.arange(6)}

    def work() -> None:
        found, _ = cache.cached_tensors(str(tmp_path), "key", build)
        assert found["images"].tolist() == [0, 1, 2, 3, 4, 5]

    started = [fork(work) for _ in range(3)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_tensors_come_back_with_a_digest_of_their_content(tmp_path: Path) -> None:
    built = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.zeros(0, 2)}
    tensors, digests = cache.cached_tensors(str(tmp_path), "k", lambda: built)
    again, _ = cache.cached_tensors(str(tmp_path), "k", pytest.fail)

    assert all(torch.equal(tensors[name], built[name]) and torch.equal(again[name], built[name]) for name in built)
    assert digests == {name: cache.content_digest(tensor) for name, tensor in built.items()}


def test_a_damaged_cache_file_is_built_again(tmp_path: Path) -> None:
    cache.cached_tensors(str(tmp_path), "k", lambda: {"a": torch.arange(500)})
    (path,) = (tmp_path / "decoded").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])

    assert cache.cached_tensors(str(tmp_path), "k", lambda: {"a": torch.arange(3)})[0]["a"].tolist() == [0, 1, 2]


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, fork: Callable[..., ForkProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: os._exit(9))
    for key in ("k", "other"):
        fork(cache.cached_tensors, str(tmp_path), key, lambda: {"a": torch.arange(3)}).join(60)
    assert len([*tmp_path.rglob("*.part")]) == 2
    monkeypatch.undo()
    cache.cached_tensors(str(tmp_path), "k", lambda: {"a": torch.arange(3)})
    assert len([*tmp_path.rglob("*.part")]) == 1  # of the other file, which another process may be writing


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xe9")
    path.touch()
    assert cache.files_key([path]) != cache.files_key([])


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UnavailableError, match=r"data\.cache_dir=.*: the disk is full; free some space"):
        cache.cached_tensors(str(tmp_path), "k", lambda: {"a": torch.arange(500)})
    assert not [path for path in (tmp_path / "decoded").iterdir() if path.suffix != ".lock"]


def test_a_really_full_disk_is_reported() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(UnavailableError, match="the disk is full"),
        cache.disk_trouble("data.cache_dir", "/dev/full", "free some space"),
    ):
        Path("/dev/full").write_bytes(b"x" * 100_000)


def test_a_cache_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"data\.cache_dir="):
        cache.cache_folder(str(tmp_path / "file"), "decoded")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "manifest"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), cache.whole_file(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_keys_change_with_content_times_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    keys = {cache.files_key([path]), cache.files_key([path], 3)}
    os.utime(path, ns=(1, 1))
    keys.add(cache.files_key([path]))
    path.write_text("three")
    os.utime(path, ns=(1, 1))
    keys.add(cache.files_key([path]))
    path.write_text("seven")
    os.utime(path, ns=(1, 1))  # as by cp --preserve
    keys.add(cache.files_key([path]))
    assert len(keys) == 5


def test_digests_tell_order_and_shape_apart() -> None:
    tensor = torch.arange(6, dtype=torch.uint8)
    digests = {cache.content_digest(item) for item in (tensor, tensor.flip(0), tensor.reshape(2, 3), tensor.int())}
    assert len(digests) == 4
