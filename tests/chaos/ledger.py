"""What was done to the stores and the trainings, and what became of them."""

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


RANK = "kill -9 of a rank"
STARTER = "kill -9 of a training's driver"
NODE = "kill -9 of a rank's raylet"
GONE = "node taken away, with notice"
GROWN = "node added"
CHECKPOINT = "truncated checkpoint"
SNAPSHOT = "damaged Ray snapshot"
TRAINING_KINDS = (RANK, STARTER, CHECKPOINT, SNAPSHOT, NODE, GONE, GROWN)


@dataclass
class Ledger:
    """The faults of a session: only those that were seen to hit.

    Attributes:
        kinds: those that there are.
        noun: what they hit.
        same: what of it is to be as if they had not.
        open: by kind, in stores that have not come to their end yet, or never did.
        closed: by kind, in stores that ended with the bytes of the reference; one number a store.
        skipped: kinds that this machine does not allow, and why.
    """

    kinds: tuple[str, ...] = KINDS
    noun: str = "stores"
    same: str = "bytes"
    open: dict[str, int] = field(default_factory=dict)
    closed: dict[str, list[int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open |= dict.fromkeys(self.kinds, 0)
        self.closed |= {kind: [] for kind in self.kinds}

    def hits(self, kind: str) -> int:
        """How often this kind has hit."""
        return self.open[kind] + sum(self.closed[kind])

    @property
    def proven(self) -> int:
        """How many faults, of all kinds, changed nothing."""
        return sum(map(sum, self.closed.values()))

    def short(self) -> list[str]:
        """The kinds that have not hit often enough yet."""
        return [kind for kind in self.kinds if sum(self.closed[kind]) < ENOUGH and kind not in self.skipped]

    def close(self, hits: dict[str, int]) -> None:
        """A store with these faults ended like the reference."""
        for kind, count in hits.items():
            self.open[kind] -= count
            self.closed[kind].append(count)

    def table(self) -> list[str]:
        """Lines for people."""
        lines = [f"{'fault':<32}{'hits':>6}{self.noun:>11}  outcome"]
        for kind in self.kinds:
            outcome = f"the same {self.same}" if self.closed[kind] else "never hit"
            if self.open[kind]:
                outcome = f"NOT THE SAME after {self.open[kind]} of them"
            if kind in self.skipped:
                outcome = f"skipped: {self.skipped[kind]}"
            lines.append(f"{kind:<32}{self.hits(kind):>6}{len(self.closed[kind]):>11}  {outcome}")
        return [*lines, f"{'in all':<32}{sum(map(self.hits, self.kinds)):>6}"]
