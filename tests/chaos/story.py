"""One run with its kills: started, killed, started again by the same command until it is through, and compared."""

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.compare import differences
from tests.chaos.lives import KILLED, PATIENCE, Life
from tests.chaos.place import Aim
from tests.chaos.scenarios import EVERYWHERE, Scenario

SURVIVES = 40.0  # seconds in which a worker must notice that another is dead: its merge_timeout and a little more
FIRST_ONLY = ("log", "bytes", "replace", "fsync", "export", "summary", "forget")  # places where only the first worker comes
DEAD_WORKER = "error: another process died or did not answer"


@dataclass
class Story:
    """What happened.

    Attributes:
        kills: (how, where) of each time that a living run was hit by SIGKILL; of two workers it may hit both at once.
        wrong: lines on what should not have been.
        lives: processes (or pairs) started.
        true: of them real ``python -m`` ones.
        noticed: seconds until a worker left behind had ended, each time that one was.
    """

    scenario: str
    kills: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lives: int = 0
    true: int = 0
    seconds: float = 0.0
    noticed: list[float] = field(default_factory=list)

    def places(self) -> Counter:
        """How many kills by place."""
        return Counter(place for _, place in self.kills)


def whole(scenario: Scenario, directory: Path) -> float:
    """The uninterrupted run in ``directory``/run; returns its seconds, start included."""
    prepare(scenario, directory)
    life = Life(command(scenario), directory, scenario.workers)
    began = time.monotonic()
    assert life.wait(PATIENCE), f"{scenario.name}: no end after {PATIENCE} s\n{life.log()}"
    assert set(life.codes) == {0}, f"{scenario.name}: {life.codes}\n" + "\n".join(map(life.log, range(scenario.workers)))
    return time.monotonic() - began


def command(scenario: Scenario) -> list[str]:
    """One command for first start and restart."""
    return [*scenario.args, "hydra.run.dir=run", "ckpt_path=last"]


def prepare(scenario: Scenario, directory: Path) -> None:
    """An empty directory, with what the run reads."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if scenario.prepare:
        scenario.prepare(directory)


def draw_aim(scenario: Scenario, rng: random.Random) -> Aim:
    """A place, one of the times that a life comes by there, and begin, middle or end of it."""
    own = scenario.places
    # a method's own places are few and the delicate ones: every second aim goes there
    places = own if own and rng.random() < 0.5 else EVERYWHERE
    place = rng.choice(sorted(places))
    moments = ("begin", "middle", "end") if place in ("bytes", "log") else ("begin", "end")
    return Aim(place, rng.randint(1, places[place]), rng.choice(moments))


def draw_time(seconds: float, rng: random.Random) -> float:
    """When to kill: mostly while it trains, now and then while it starts."""
    return seconds * (rng.uniform(0.35, 1.05) if rng.random() < 0.85 else rng.uniform(0.02, 0.35))


def tell(
    scenario: Scenario,
    directory: Path,
    reference: Path,
    seconds: float,
    rng: random.Random,
    kills: int,
    true: int = 0,
    aims: list[Aim] | None = None,
) -> Story:
    """Kill a run so many times, let it end, compare it with the uninterrupted one.

    Args:
        scenario: which run.
        directory: for this story; emptied.
        reference: the uninterrupted run's directory.
        seconds: what that one took.
        rng: draws moments and places.
        kills: after these the run is left alone.
        true: so many of the first lives are real ``python -m`` processes, killed from outside.
        aims: places for the first lives, instead of drawn ones.
    """
    story, began, aims = Story(scenario.name), time.monotonic(), list(aims or [])
    prepare(scenario, directory)
    unhit = 0  # lives that ended before their death came
    while True:
        left_alone = len(story.kills) >= kills or unhit > 3
        aim = None
        if not left_alone and not true:
            aim = aims.pop(0) if aims else draw_aim(scenario, rng) if rng.random() < 0.5 else None
        victim, both = rng.randrange(scenario.workers), rng.random() < 0.5
        if aim and aim.place in FIRST_ONLY:
            victim = 0
        life = Life(command(scenario), directory, scenario.workers, {victim: aim} if aim else None, true=true > 0)
        story.lives += 1
        try:
            if left_alone:
                life.wait(PATIENCE)
            else:
                _kill(life, story, victim, both, aim, draw_time(seconds, rng), true > 0)
            codes = life.codes
            if None in codes:
                story.wrong.append(f"no end after {PATIENCE} s: {codes} at {[life.place(r) for r in range(len(codes))]}")
                break
            if set(codes) == {0} and (directory / "run" / "summary.json").is_file():
                if left_alone or unhit > 3:
                    story.wrong += differences(directory / "run", reference / "run")
                    break
                unhit += 1
                shutil.rmtree(directory / "run")  # from the beginning: a finished run has nothing left to kill
            elif KILLED not in codes:
                story.wrong.append(f"ended with {codes}: " + " | ".join(life.log(r)[-2000:] for r in range(len(codes))))
                break
        finally:
            life.end()
        true = max(0, true - 1)
    story.seconds = time.monotonic() - began
    return story


def _kill(life: Life, story: Story, victim: int, both: bool, aim: Aim | None, after: float, true: bool) -> None:
    """Wait for death by its own hand, or bring it after so many seconds; then see what a worker left behind does."""
    if aim:
        life.wait(PATIENCE, [victim])
        how = f"aimed: {aim.place}, {aim.moment}"
    else:
        how = "python -m" if true else "timed"
        if true:  # the imports are of no interest
            while "run directory:" not in life.log() and life.codes[victim] is None:
                time.sleep(0.02)
        if not life.wait(after, [victim]):
            life.kill(victim)
            life.wait(PATIENCE, [victim])
    if life.codes[victim] != KILLED:
        life.wait(PATIENCE)
        return
    place = life.place(victim)
    story.kills.append((how, place))
    rest = [rank for rank in range(len(life.codes)) if rank != victim]
    # before they have met, nobody can know of anybody's death; whoever started them (torchrun) ends them
    if both or place.startswith(("start", "meeting")):
        for rank in rest:
            if life.codes[rank] is None:
                life.kill(rank)
                story.kills[-1] = (f"{how}; all workers", place)
        life.wait(PATIENCE)
        return
    began = time.monotonic()
    if not life.wait(SURVIVES, rest):
        story.wrong.append(
            f"a worker did not notice within {SURVIVES} s that another had died at {place}: {life.stacks(rest[0])}"
        )
        return
    for rank in rest:
        story.noticed.append(time.monotonic() - began)
        lines = [line for line in life.log(rank).splitlines() if line.startswith("error: ")]
        done = life.codes[rank] == 0 and place.startswith(("trained", "end"))  # rank 0 died after the last thing done together
        if not done and (life.codes[rank] != 1 or len(lines) != 1 or not lines[0].startswith(DEAD_WORKER)):
            story.wrong.append(f"a worker left behind at {place} ended with {life.codes[rank]}: {life.log(rank)[-1500:]}")
        if "Traceback" in life.log(rank):
            story.wrong.append(f"a worker left behind at {place} shows a traceback: {life.log(rank)[-1500:]}")
