"""FFCV's loader with a thread that can be stopped and whose errors reach whoever waits for it. Only this file knows FFCV's inside."""

import atexit
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ffcv.loader.loader
import numba
import numpy as np
import torch
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.loader import OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.loader.loader import Loader
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.compiler import Compiler

_POLL_S = 0.2
_PATIENCE_S = 10.0


class _SystemCache(OSCacheManager):
    """FFCV's own marks an array type as read-only that is the process's one of its kind, which spoils what numba has compiled before."""

    def compile_reader(self) -> Callable[..., np.ndarray]:
        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        return Compiler.compile(read)


ffcv.loader.loader.OSCacheManager = _SystemCache  # type: ignore[assignment]


class Decoder(Loader):
    """Decodes a file's images, in FFCV's thread, with `num_workers` threads of numba below it. Building one compiles for seconds."""

    def __init__(self, path: Path, batch_size: int, num_workers: int, os_cache: bool) -> None:
        threads = torch.get_num_threads()
        try:
            super().__init__(
                str(path),
                batch_size=batch_size,
                num_workers=num_workers,
                os_cache=os_cache,
                order=OrderOption.SEQUENTIAL,
                seed=0,
                drop_last=False,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": None},  # type: ignore[arg-type]
            )
        finally:
            # FFCV sets torch's threads for the whole process.
            torch.set_num_threads(threads)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64, from the file's table: nothing is decoded."""
        return self.reader.metadata[f"f{self.reader.field_names.index('label')}"].astype(np.int64)

    @property
    def image_size(self) -> int:
        """The side of the images, in pixels."""
        return int(self.reader.metadata[f"f{self.reader.field_names.index('image')}"]["height"][0])


class DecodingThread(EpochIterator):
    """Decodes `order` in batches and hands over what `finish` makes of each: its (B, H, H, 3) uint8 pixels, which are overwritten by the
    next batch's, and its number.
    """

    def __init__(self, decoder: Decoder, order: np.ndarray, finish: Callable[[np.ndarray, int], torch.Tensor]) -> None:
        self.finish = finish
        super().__init__(decoder, order)  # type: ignore[arg-type]  # starts the thread
        # A thread at work would hold up the end of the process.
        atexit.register(self.stop)

    def run(self) -> None:
        """The thread's work. FFCV's own `run` leaves its consumer waiting for ever when it fails, and sets torch's threads."""
        numba.set_num_threads(self.loader.num_workers)
        try:
            for number, indices in enumerate(self.iter_ixes):
                (pixels,) = self.run_pipeline(number, indices, 0, None)
                if not self._hand_over(self.finish(pixels, number)):
                    return
        except BaseException as error:
            self._hand_over(error)

    def next_images(self) -> torch.Tensor:
        """Wait for the next batch.

        Raises:
            RuntimeError: the thread died, or one that reads pages for it; its own error is the cause.
        """
        while True:
            try:
                found = self.output_queue.get(timeout=_POLL_S)
            except queue.Empty:
                if self.output_queue.empty() and not all(thread.is_alive() for thread in (self, *self._page_readers())):
                    raise RuntimeError(f"FFCV's loader of {self.loader.fname} died; its traceback is above") from None
                continue
            if isinstance(found, BaseException):
                raise RuntimeError(f"FFCV's loader of {self.loader.fname} died: {found!r}") from found
            return found

    def stop(self) -> None:
        """End the thread, wherever it is, and free its memory."""
        atexit.unregister(self.stop)
        self.terminate_event.set()
        for _ in range(int(_PATIENCE_S / _POLL_S)):
            with suppress(queue.Empty):
                self.output_queue.get_nowait()
            self.join(_POLL_S)
            if not self.is_alive():
                break
        if not self.closed:
            self.close()
            self.closed = True
        for reader in self._page_readers():
            reader.join(_PATIENCE_S)

    def _hand_over(self, batch: torch.Tensor | BaseException) -> bool:
        while not self.terminate_event.is_set():
            with suppress(queue.Full):
                self.output_queue.put(batch, timeout=_POLL_S)
                return not self.terminate_event.is_set()
        return False

    def _page_readers(self) -> list[threading.Thread]:
        """The threads that FFCV reads with where the operating system does not cache the file."""
        executor = getattr(self.memory_context, "executor", None)
        return executor.threads if executor else []
