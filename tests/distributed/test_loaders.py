import itertools
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.beton import in_use
from distributed.decoding import DecodingThread
from distributed.loaders import BetonBatches, FFCVEpisodes, FFCVLoader, LoaderConfig, usable_workers
from metadiff import episode_images
from metadiff.artifact import Artifact
from metadiff.episode_images import EpisodePlan, MemoryEpisodes
from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, Batch, MemoryLoader
from metadiff.parallel import ALONE, Ranks
from tests.distributed.betons import noise, normal, prepared

IMAGES = noise()
COUNT, BATCH = len(IMAGES.labels), 7
PLAIN, RICH = AugmentConfig(crop="none", flip=False), AugmentConfig(color_jitter=0.4)
ONE = LoaderConfig(num_workers=1)
PAGED = LoaderConfig(num_workers=1000, os_cache=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepared(tmp_path_factory.mktemp("loaders"), IMAGES)


@pytest.fixture(scope="module")
def one(artifact: Artifact) -> BetonBatches:
    """With one decoding thread and the operating system's cache."""
    return BetonBatches(artifact, "base", BATCH, ONE)


@pytest.fixture(scope="module")
def paged(artifact: Artifact) -> BetonBatches:
    """With as many threads as there may be, reading page by page."""
    return BetonBatches(artifact, "base", BATCH, PAGED)


@pytest.fixture(params=["one", "paged"])
def batches(request: pytest.FixtureRequest) -> BetonBatches:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before and type(thread).__name__ != "TMonitor"] == []


ORDERS = {
    "sequential": np.arange(COUNT),
    "random": np.random.default_rng(1).permutation(COUNT),
    "repeated": np.random.default_rng(2).integers(0, COUNT, 3 * BATCH),
    "one image": np.array([COUNT - 1]),
    "nothing": np.array([], np.int64),
}


@pytest.mark.parametrize("order", ORDERS)
def test_pixels_and_labels_are_the_source_s_in_every_order(batches: BetonBatches, order: str) -> None:
    indices = ORDERS[order]
    # A list, because what is handed out must outlive what comes after it.
    delivered = list(batches.batches(indices))
    assert [len(labels) for _, labels in delivered] == [
        len(part) for part in np.split(indices, range(BATCH, len(indices), BATCH)) if len(part)
    ]
    for (images, labels), start in zip(delivered, range(0, len(indices), BATCH), strict=True):
        part = indices[start : start + BATCH]
        assert torch.equal(images, normal(IMAGES, part))
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == IMAGES.labels[part].tolist()
        assert labels.dtype == torch.int64


def test_labels_need_no_decoding(one: BetonBatches) -> None:
    assert one.labels.tolist() == IMAGES.labels.tolist()


def test_two_iterations_at_once_do_not_disturb_each_other(one: BetonBatches) -> None:
    orders = ORDERS["random"], ORDERS["sequential"]
    for step, pair in enumerate(zip(*(one.batches(order) for order in orders), strict=True)):
        for (images, _), order in zip(pair, orders, strict=True):
            assert torch.equal(images, normal(IMAGES, order[step * BATCH : (step + 1) * BATCH]))


@pytest.mark.parametrize("wrong", [-1, COUNT, 10**9])
def test_an_index_out_of_range_is_refused_at_once(one: BetonBatches, wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"base\.beton: asked for images .*, there are {COUNT}"):
        one.batches(np.array([0, wrong]))


def test_an_error_in_the_thread_reaches_the_consumer(one: BetonBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "_transform", lambda pixels, numbers: np.zeros(1)[2] if 14 in numbers else torch.zeros(1))
    stream = one.batches(np.arange(COUNT))
    next(stream)
    next(stream)
    with pytest.raises(RuntimeError, match=r"FFCV's loader of .*base\.beton died: IndexError") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, IndexError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_thread_that_is_gone_is_noticed(one: BetonBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodingThread, "run", lambda self: None)
    with pytest.raises(RuntimeError, match=r"FFCV's loader of .*base\.beton died"):
        next(one.batches(np.arange(COUNT)))


def test_a_reader_of_pages_that_is_gone_is_noticed(paged: BetonBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffcv.memory_managers.process_cache.page_reader.PageReader.run", lambda self: None)
    monkeypatch.setattr("distributed.decoding._PATIENCE_S", 0.4)
    stream = paged.batches(np.arange(COUNT))
    with pytest.raises(RuntimeError, match=r"FFCV's loader of .*base\.beton died"):
        next(stream)
    # FFCV's thread waits for that page; let it go, as this process lives on.
    for thread in [thread for thread in threading.enumerate() if isinstance(thread, DecodingThread)]:
        pages: Any = thread.memory_context
        for page in pages.schedule.page_to_slot:
            pages.executor.loaded_queue.put(page)
        thread.join()


@pytest.mark.parametrize("way", ["close", "error", "garbage"])
def test_leaving_early_leaves_nothing_behind(batches: BetonBatches, way: str) -> None:
    def leave() -> None:
        stream = batches.batches(ORDERS["random"])
        next(stream)
        if way == "close":
            stream.close()  # type: ignore[attr-defined]
        elif way == "error":
            with pytest.raises(GeneratorExit):
                stream.throw(GeneratorExit)  # type: ignore[attr-defined]

    leave()
    threads, memory = threading.active_count(), resident()
    for _ in range(40):
        leave()
    assert threading.active_count() == threads
    assert resident() - memory < 8 * 2**20


def test_the_end_of_the_process_waits_for_no_thread(one: BetonBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: set[Any] = set()
    monkeypatch.setattr("atexit.register", at_exit.add)
    monkeypatch.setattr("atexit.unregister", at_exit.discard)
    stream = one.batches(ORDERS["random"])
    next(stream)
    for end in list(at_exit):
        end()
    assert not any(isinstance(thread, DecodingThread) for thread in threading.enumerate())
    assert not at_exit


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_torch_s_threads_are_left_alone(artifact: Artifact) -> None:
    torch.set_num_threads(2)
    try:
        stream = BetonBatches(artifact, "base", BATCH, ONE).batches(np.arange(COUNT))
        assert torch.get_num_threads() == 2
        next(stream)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_number_of_workers_is_clamped(paged: BetonBatches) -> None:
    cores = usable_workers(0)
    assert usable_workers(1000) == cores == paged._decoder.num_workers
    assert usable_workers(1) == 1


def test_the_file_is_held_while_it_is_read(artifact: Artifact, one: BetonBatches) -> None:
    assert in_use(artifact.path / "base.beton")


def test_a_file_is_let_go_with_its_reader(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "base.beton"
    path.write_bytes((artifact.path / "base.beton").read_bytes())
    reader = BetonBatches(Artifact(tmp_path, artifact.manifest), "base", BATCH, ONE)
    assert in_use(path)
    del reader
    assert not in_use(path)


def equal(these: list[Batch], those: list[Batch]) -> bool:
    pairs = zip(these, those, strict=True)
    return all(torch.equal(images, others) and labels.tolist() == names.tolist() for (images, labels), (others, names) in pairs)


def joined(parts: list[list[Batch]]) -> list[Batch]:
    return [(torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step])) for step in zip(*parts, strict=True)]


def test_an_epoch_is_that_of_the_loader_in_memory(artifact: Artifact) -> None:
    ours, theirs = FFCVLoader(artifact, "base", 16, PLAIN, 3, ONE), MemoryLoader(IMAGES, 16, PLAIN, 3)
    assert ours.steps_per_epoch == theirs.steps_per_epoch == 3
    for epoch in (0, 5):
        assert equal(list(ours.epoch(epoch)), list(theirs.epoch(epoch)))
    assert not equal(list(ours.epoch(0)), list(ours.epoch(1)))


def test_augmentation_does_not_depend_on_the_number_of_ranks(artifact: Artifact) -> None:
    whole = FFCVLoader(artifact, "base", 16, RICH, 3, ONE)
    parts = [FFCVLoader(artifact, "base", 16, RICH, 3, ONE, Ranks(rank, 2)) for rank in (0, 1)]
    assert equal(joined([list(part.epoch(2)) for part in parts]), list(whole.epoch(2)))
    assert not equal(list(whole.epoch(2)), list(whole.epoch(3)))


def test_batches_that_cannot_be_are_refused(artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"pretrain\.batch_size=16: cannot be shared equally by 3 workers.*ray\.num_workers"):
        FFCVLoader(artifact, "base", 16, PLAIN, 0, ONE, Ranks(0, 3))
    with pytest.raises(UserError, match=r"pretrain\.batch_size=61: the base split has only 60 images"):
        FFCVLoader(artifact, "base", 61, PLAIN, 0, ONE)


def plan(ranks: Ranks = ALONE) -> EpisodePlan:
    return EpisodePlan(EpisodeSampler(IMAGES.offsets, 3, 2, 1, seed=4), TaskSchedule(11, 4), 4, ranks)


def steps(artifact: Artifact, start: int, augment: AugmentConfig | None = None, ranks: Ranks = ALONE) -> list[torch.Tensor]:
    """The support images of seven steps, put together from their pieces."""
    count = 7 * plan(ranks).pieces_a_step
    with closing(FFCVEpisodes(artifact, "base", plan(ranks), ONE, augment, 5).pieces(start)) as pieces:
        return list(torch.cat(list(itertools.islice(pieces, count))).chunk(7))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps are drawn at once, of two pieces or more."""
    monkeypatch.setattr(episode_images, "_EPISODES_AHEAD", 3 * 4)
    monkeypatch.setattr(episode_images, "_PIECE", 20)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ranks", [ALONE, Ranks(1, 2), Ranks(2, 3, elastic=True)])
@pytest.mark.parametrize("start", [0, 50])
def test_episodes_are_those_of_the_loader_in_memory(artifact: Artifact, ranks: Ranks, start: int) -> None:
    with closing(FFCVEpisodes(artifact, "base", plan(ranks), ONE).pieces(start)) as ours:
        pairs = zip(itertools.islice(ours, 9), MemoryEpisodes(IMAGES, plan(ranks)).pieces(start), strict=False)
        for images, expected in pairs:
            assert torch.equal(images, expected)
            assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("small_blocks")
def test_augmentation_of_episodes_depends_on_their_number_alone(artifact: Artifact) -> None:
    whole, last = steps(artifact, 50, RICH), Ranks(2, 3, elastic=True)
    for part, step in zip(steps(artifact, 50, RICH, last), whole, strict=True):
        assert torch.equal(part, step.unflatten(0, (4, -1))[last.share(4)].flatten(0, 1))
    assert all(torch.equal(later, step) for later, step in zip(steps(artifact, 52, RICH), whole[2:], strict=False))
    plain = torch.cat(steps(artifact, 50))
    support = plan().draw(50, 7).support.ravel()
    shown = {image: np.flatnonzero(support == image) for image in set(support.tolist())}
    again = [places[:2] for places in shown.values() if len(places) > 1]
    assert again, "some image is shown twice"
    assert all(torch.equal(*plain[places]) for places in again)
    assert not any(torch.equal(*torch.cat(whole)[places]) for places in again)


def test_the_loader_in_memory_needs_no_ffcv() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('ffcv', 'numba', 'cv2')))\n"
        "import distributed.beton, distributed.loaders\n"
        "from metadiff.images import AugmentConfig, MemoryLoader\n"
        "from tests.distributed.betons import noise\n"
        "assert len(list(MemoryLoader(noise(), 20, AugmentConfig(), 0).epoch(0))) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
