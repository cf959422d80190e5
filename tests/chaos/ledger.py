"""What was done to the stores, and what became of them."""

from dataclasses import dataclass, field

ENOUGH = 8
ENOUGH_IN_ALL = 100

ACTOR = "kill -9 of an actor"
RAYLET = "kill -9 of a raylet"
DRIVER = "kill -9 of the driver"
TWICE = "killed twice in a row"
COMMIT = "kill -9 during a commit"
TRUNCATED = "truncated shard"
FLIPPED = "flipped byte"
ANSWERS_500 = "S3 answers 500"
ANSWERS_503 = "S3 answers 503"
SLOW = "S3 is slow"
CUT = "S3 hangs up mid-PUT"
LOST = "S3 loses the answer"
DISK_FULL = "disk full"
RACE = "two drivers racing"
KINDS = (ACTOR, RAYLET, DRIVER, TWICE, COMMIT, TRUNCATED, FLIPPED, ANSWERS_500, ANSWERS_503, SLOW, CUT, LOST, DISK_FULL, RACE)


@dataclass
class Ledger:
    """The faults of a session: only those that were seen to hit.

    Attributes:
        open: by kind, in stores that have not come to their end yet, or never did.
        closed: by kind, in stores that ended with the bytes of the reference; one number a store.
        skipped: kinds that this machine does not allow, and why.
    """

    open: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    closed: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    skipped: dict[str, str] = field(default_factory=dict)

    def hits(self, kind: str) -> int:
        """How often this kind has hit."""
        return self.open[kind] + sum(self.closed[kind])

    @property
    def proven(self) -> int:
        """How many faults, of all kinds, changed nothing."""
        return sum(map(sum, self.closed.values()))

    def short(self) -> list[str]:
        """The kinds that have not hit often enough yet."""
        return [kind for kind in KINDS if sum(self.closed[kind]) < ENOUGH and kind not in self.skipped]

    def close(self, hits: dict[str, int]) -> None:
        """A store with these faults ended like the reference."""
        for kind, count in hits.items():
            self.open[kind] -= count
            self.closed[kind].append(count)

    def table(self) -> list[str]:
        """Lines for people."""
        lines = [f"{'fault':<26}{'hits':>6}{'stores':>8}  outcome"]
        for kind in KINDS:
            outcome = "the same bytes" if self.closed[kind] else "never hit"
            if self.open[kind]:
                outcome = f"NOT THE SAME after {self.open[kind]} of them"
            if kind in self.skipped:
                outcome = f"skipped: {self.skipped[kind]}"
            lines.append(f"{kind:<26}{self.hits(kind):>6}{len(self.closed[kind]):>8}  {outcome}")
        return [*lines, f"{'in all':<26}{sum(map(self.hits, KINDS)):>6}"]
