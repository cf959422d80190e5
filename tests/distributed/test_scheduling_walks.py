"""Whatever happens to the workers, in whatever order: no block is lost, none is done for nothing, and the same news gives the same."""

import random
from collections import Counter

import pytest

from distributed.scheduling import Dispatcher

CURSED, DEADLY = 0.1, 0.05


class Walk:
    """A crew to which things happen at random, and a shell that does what the dispatcher says, now and then late."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.attempts, self.losses, self.outages = (self.rng.randint(1, 4) for _ in range(3))
        self.ahead = self.rng.randint(1, 4)
        self.blocks = range(self.rng.randint(1, 40))
        self.cursed = {block for block in self.blocks if self.rng.random() < CURSED}
        self.deadly = {block for block in self.blocks if self.rng.random() < DEADLY}
        self.dispatcher = Dispatcher[int, int](
            self.blocks,
            self.attempts,
            self.losses,
            self.ahead,
            outages=self.outages,
            straggler=self.rng.choice([1, 2, float("inf")]),
            patience=self.rng.choice([0, 3]),
            spares=self.rng.choice([0, 0.05, 1]),
        )
        self.now, self.num_hired, self.wanted = 0.0, 0, self.rng.randint(1, 8)
        self.workers, self.left, self.until = set[int](), set[int](), dict[int, float]()
        self.errors, self.outage, self.deaths = Counter[int](), Counter[int](), Counter[int]()
        self.log: list[object] = []

    def finish(self) -> None:
        """Walk until every block is settled."""
        for _ in range(20_000):
            if self.dispatcher.drained:
                return
            self._hire()
            self._decide()
            self._check()
            self._happen()
            self._check()
        pytest.fail(f"stuck: {self.log[-20:]}")

    def _hire(self) -> None:
        staff = len(self.workers - self.left)
        while staff < min(self.wanted, self.dispatcher.num_wanted) and (staff == 0 or self.rng.random() < 0.5):
            self.dispatcher.joined(self.num_hired, self.now)
            self.workers.add(self.num_hired)
            self.num_hired += 1
            staff += 1

    def _decide(self) -> None:
        held = {worker: set(self.dispatcher.held(worker)) for worker in self.workers}
        given = self.dispatcher.assignments(self.now)
        self.log.append((self.now, given))
        for worker, block in given:
            assert worker in self.workers
            assert worker not in self.left or self.now < self.until[worker]
            assert block not in held[worker], "a copy never to the same worker"
            assert block not in self.dispatcher.finished | set(self.dispatcher.poisoned)
            held[worker].add(block)
        assert self.dispatcher.assignments(self.now) == []
        wake = self.dispatcher.wake_at(self.now)
        assert wake is None or wake > self.now, "what was due is decided; a shell that waits until then does not spin"
        for worker, block in self.dispatcher.stale():
            if self.rng.random() < 0.5:
                self._cancel(worker, block)
        for worker in self.dispatcher.superfluous(self.now):
            assert not self.dispatcher.held(worker)
            if self.rng.random() < 0.8:
                self._lose(worker)

    def _cancel(self, worker: int, block: int) -> None:
        if self.dispatcher.held(worker)[0] == block and self.rng.random() < 0.5:
            self._lose(worker)
        else:
            self.dispatcher.dropped(worker, block, self.now)

    def _lose(self, worker: int) -> None:
        self.dispatcher.lost(worker, f"lost {worker}", self.now)
        self.workers.discard(worker)
        assert self.dispatcher.held(worker) == ()

    def _happen(self) -> None:
        """One piece of news, after some time, or the time that the dispatcher asks to be woken at."""
        at_work = [worker for worker in sorted(self.workers) if self.dispatcher.held(worker)]
        wake = self.dispatcher.wake_at(self.now)
        if wake is not None and (not at_work or self.rng.random() < 0.3):
            assert wake >= self.now
            self.now = wake
        elif self.workers and self.rng.random() < 0.1:
            self._leave_or_lose(self.rng.choice(sorted(self.workers)))
        elif at_work:
            self.now += self.rng.expovariate(0.5)
            self._report(self.rng.choice(at_work))
        else:
            assert not self.dispatcher.drained, "somebody is at work, or time will tell, or a worker is missing"

    def _leave_or_lose(self, worker: int) -> None:
        if self.rng.random() < 0.5:
            first = self.dispatcher.held(worker)[:1]
            self.until[worker] = self.rng.choice([float("-inf"), self.now + 20])
            self.dispatcher.leaving(worker, self.now, self.until[worker])
            assert self.dispatcher.held(worker) == first
            self.left.add(worker)
            return
        self.deaths.update(self.dispatcher.held(worker)[:1] if worker not in self.left else ())
        self._lose(worker)

    def _report(self, worker: int) -> None:
        # News of two blocks that are done at about the same time may come in either order.
        block = self.rng.choice(self.dispatcher.held(worker)[: 2 if self.rng.random() < 0.1 else 1])
        chance = self.rng.random()
        if block in self.deadly:
            self.deaths[self.dispatcher.held(worker)[0]] += worker not in self.left
            self._lose(worker)
        elif block in self.cursed or chance < 0.05:
            self.errors[block] += 1
            self.dispatcher.failed(worker, block, "error", self.now)
        elif chance < 0.1:
            self.outage[block] += 1
            self.dispatcher.failed(worker, block, "down", self.now, pause=2.0 ** self.dispatcher.num_failures(block))
        else:
            is_first = block not in self.dispatcher.finished
            assert self.dispatcher.done(worker, block, self.now) == is_first

    def _check(self) -> None:
        """Every block is in one place, and nobody holds too much."""
        hands = {worker: self.dispatcher.held(worker) for worker in self.workers}
        assert all(len(held) == len(set(held)) <= max(self.ahead, 1) for held in hands.values())
        copies = Counter(block for held in hands.values() for block in held)
        open_ = set(copies) - self.dispatcher.finished
        assert all(copies[block] <= 2 for block in open_)
        settled = self.dispatcher.finished, set(self.dispatcher.poisoned), open_
        assert sum(map(len, settled)) + self.dispatcher.num_waiting == len(self.blocks)
        assert len(set.union(*settled)) == sum(map(len, settled))
        stale = self.dispatcher.stale()
        assert all(block in hands[worker] for worker, block in stale)
        assert {(worker, block) for worker, held in hands.items() for block in held if block not in open_} <= set(stale)
        assert all(copies[block] == 2 for _, block in stale if block in open_)
        assert self.dispatcher.num_wanted == self.dispatcher.num_waiting + len(open_)


@pytest.mark.parametrize("seed", range(400))
def test_every_block_is_settled_whatever_happens(seed: int) -> None:
    walk = Walk(seed)
    walk.finish()
    assert walk.dispatcher.finished | set(walk.dispatcher.poisoned) == set(walk.blocks)
    assert not walk.dispatcher.finished & set(walk.dispatcher.poisoned)
    assert not walk.dispatcher.finished & walk.deadly
    for block in walk.dispatcher.poisoned:
        assert walk.errors[block] >= walk.attempts or walk.deaths[block] >= walk.losses or walk.outage[block] >= walk.outages
    assert walk.dispatcher.wake_at(walk.now) is None


@pytest.mark.parametrize("seed", range(10))
def test_the_same_news_leads_to_the_same_decisions(seed: int) -> None:
    walks = [Walk(seed), Walk(seed)]
    for walk in walks:
        walk.finish()
    assert walks[0].log == walks[1].log


def test_the_walks_see_what_can_happen() -> None:
    """Copies, retries, losses and blocks given up: else the other tests here would say little."""
    walks = [Walk(seed) for seed in range(100)]
    for walk in walks:
        walk.finish()
    for count in ("num_copies", "num_retries", "num_losses"):
        assert sum(getattr(walk.dispatcher, count) for walk in walks) > 100
    assert sum(len(walk.dispatcher.poisoned) for walk in walks) > 100
