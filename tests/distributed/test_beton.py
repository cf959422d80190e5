import errno
import fcntl
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distributed import beton
from distributed.beton import BetonConfig, hold, import_ffcv, in_use, refuse_if_in_use, verified, write_beton
from distributed.loaders import BetonBatches, LoaderConfig
from metadiff.artifact import Artifact
from metadiff.errors import UserError
from tests.distributed.betons import noise, prepared

IMAGES = noise()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepared(tmp_path_factory.mktemp("written"), IMAGES)


@pytest.fixture
def artifact(written: Artifact, tmp_path: Path) -> Artifact:
    """A copy to spoil."""
    return Artifact(Path(shutil.copytree(written.path, tmp_path / "prepare")), written.manifest)


def modes(path: Path) -> Counter[str]:
    from ffcv.reader import Reader

    return Counter({0: "jpg", 1: "raw"}[mode] for mode in Reader(str(path)).metadata["f0"]["mode"].tolist())


def refusal(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which a loader refuses the file, without letting FFCV open it."""
    monkeypatch.setattr("ffcv.loader.loader.Reader", lambda *_: pytest.fail("FFCV opened the file"))
    with pytest.raises(UserError) as caught:
        BetonBatches(artifact, "base", 4, LoaderConfig(num_workers=1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_arrays_make_the_same_bytes(written: Artifact, tmp_path: Path) -> None:
    again = prepared(tmp_path, IMAGES)
    assert again.content == written.content
    assert list(again.manifest["files"]) == ["base.beton"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BetonConfig(), {"raw": 60}),
        (BetonConfig(write_mode="jpg"), {"jpg": 60}),
        (BetonConfig(write_mode="smart", jpeg_above=1199), {"jpg": 60}),
        (BetonConfig(write_mode="smart", jpeg_above=1200), {"raw": 60}),
    ],
    ids=["raw", "jpg", "smart above", "smart below"],
)
def test_write_modes(tmp_path: Path, settings: BetonConfig, expected: dict[str, int]) -> None:
    write_beton(tmp_path / "base.beton", IMAGES, settings, "beton base")
    assert modes(tmp_path / "base.beton") == expected


def test_proportion_is_repeatable_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    for name in ("first", "second"):
        np.random.random()
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        write_beton(tmp_path / name, IMAGES, BetonConfig(write_mode="proportion", jpeg_share=0.3), name)
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert 8 <= modes(tmp_path / "first")["jpg"] <= 28


def test_quality_sets_the_size(tmp_path: Path) -> None:
    lengths = []
    for quality in (10, 95):
        write_beton(tmp_path / f"{quality}", IMAGES, BetonConfig(write_mode="jpg", jpeg_quality=quality), "beton")
        from ffcv.reader import Reader

        lengths.append(Reader(str(tmp_path / f"{quality}")).alloc_table["size"].sum())
    assert lengths[0] * 1.3 < lengths[1]


def test_a_page_holds_several_large_images() -> None:
    assert beton._page_size(84 * 84 * 3) == 1 << 21
    assert beton._page_size(600 * 600 * 3) == 1 << 24


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "base.beton").write_bytes(b"whole")
    write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    assert (tmp_path / "base.beton").read_bytes() == b"whole"


@pytest.mark.parametrize("dies_in", ["handle_sample", "finalize"])
def test_half_a_file_never_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    target = "ffcv.writer.handle_sample" if dies_in == "handle_sample" else "ffcv.writer.DatasetWriter.finalize"
    with monkeypatch.context() as patch:
        patch.setattr(target, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    assert [path.name for path in tmp_path.iterdir()] == ["base.beton.tmp"]
    write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    assert [path.name for path in tmp_path.iterdir()] == ["base.beton"]


def test_no_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_page_cut_short_by_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv.memory_allocator import MemoryAllocator

    def short(allocator: Any) -> None:
        flush(allocator)
        allocator.fp.truncate(allocator.fp.tell() - 512)

    flush = MemoryAllocator.flush_page
    monkeypatch.setattr(MemoryAllocator, "flush_page", short)
    with pytest.raises(OSError, match=r"base\.beton") as caught:
        write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "base.beton").exists()


def test_a_file_cut_by_100_bytes_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifact.path / "base.beton"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    message = refusal(artifact, monkeypatch)
    assert f"base.beton has {size - 100} bytes, the manifest says {size}; redo prepare with --force" in message


def test_a_flipped_byte_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    verified(artifact, "base")
    path = artifact.path / "base.beton"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    assert "base.beton has the checksum " in refusal(artifact, monkeypatch)


def test_another_data_set_s_file_is_refused(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beton(tmp_path / "other", noise(seed=1), BetonConfig(), "beton other")
    assert (tmp_path / "other").stat().st_size == (artifact.path / "base.beton").stat().st_size
    (tmp_path / "other").replace(artifact.path / "base.beton")
    assert "base.beton has the checksum " in refusal(artifact, monkeypatch)


def test_a_file_half_written_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact.path / "base.beton").rename(artifact.path / "base.beton.tmp")
    assert "base.beton is missing; redo prepare with --force" in refusal(artifact, monkeypatch)


def test_an_artifact_without_the_file_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    without = Artifact(artifact.path, {**artifact.manifest, "files": {}})
    assert "has no base.beton; redo prepare with loader.kind=ffcv and --force, or set loader.kind=memory" in refusal(without, monkeypatch)


def test_the_checksum_is_computed_once_for_a_file_as_it_lies_there(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(beton, "sha256", lambda path: computed.append(path) or artifact.manifest["files"]["base.beton"]["sha256"])
    for _ in range(3):
        assert verified(artifact, "base") == artifact.path / "base.beton"
    assert len(computed) == 1
    os.utime(artifact.path / "base.beton", ns=(1, 1))
    verified(artifact, "base")
    assert len(computed) == 2


def test_a_file_that_is_read_is_not_replaced(artifact: Artifact) -> None:
    path = artifact.path / "base.beton"
    refuse_if_in_use(artifact.path)
    with hold(path), hold(path):
        assert in_use(path)
        with pytest.raises(
            UserError, match=r"base\.beton: in use by another run; wait until that one has ended, or choose another run\.name"
        ):
            refuse_if_in_use(artifact.path)
    assert not in_use(path)


def test_a_file_that_is_replaced_is_not_read(artifact: Artifact) -> None:
    with (artifact.path / "base.beton").open("r+b") as replaced:
        fcntl.flock(replaced, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"base\.beton: is being replaced by another run; start again when it is done"):
            BetonBatches(artifact, "base", 4, LoaderConfig(num_workers=1))


def test_ffcv_absent_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> None:
    for name in ("ffcv", "ffcv.loader", "ffcv.writer"):
        monkeypatch.setitem(sys.modules, name, None)
    expected = r"loader\.kind='ffcv': FFCV cannot be imported .*apt-get install .* libopencv-dev && pip install 'metadiff\[ffcv\]'"
    with pytest.raises(UserError, match=expected):
        write_beton(tmp_path / "base.beton", IMAGES, BetonConfig(), "beton base")
    with pytest.raises(UserError, match=expected):
        BetonBatches(artifact, "base", 4, LoaderConfig())


def test_importing_leaves_torch_s_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    import_ffcv()
    assert set_to[-1] == 5
