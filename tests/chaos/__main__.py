"""The long form: ``python -m tests.chaos [--kills N] [--seed N] [--only SCENARIO …]``.

Prints every kill; the exit code is 1 if anything differs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS
from tests.chaos.story import Story, tell, whole

PER_STORY = 7  # kills
SHOWN = 12  # differences of a story
TRUE = 4  # of all kills: real `python -m` processes


def main() -> int:
    """Kill until enough have been killed; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--true", type=int, default=TRUE)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--keep", type=Path, help="where the runs' directories stay")
    options = parser.parse_args()
    began, stories = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        lengths: dict[str, float] = {}
        count = 0
        while count < options.kills:
            name = options.only[len(stories) % len(options.only)]
            scenario, words = SCENARIOS[name], name.replace(" ", "-")
            if name not in lengths:
                if not lengths:  # the first life waits for the server's imports
                    whole(scenario, root / f"{words}-whole")
                lengths[name] = whole(scenario, root / f"{words}-whole")
            rng = random.Random(f"{options.seed}/{len(stories)}/{name}")
            true = 1 if scenario.workers == 1 and sum(s.true for s in stories) < options.true else 0
            directory = root / f"{words}-{len(stories)}"
            kills = min(PER_STORY, options.kills - count)
            story = tell(scenario, directory, root / f"{words}-whole", lengths[name], rng, kills, true)
            story.true = true
            stories.append(story)
            count += len(story.kills)
            show(story, count)
    return close(stories, options.seed, time.monotonic() - began)


def show(story: Story, count: int) -> None:
    """A line per story, and one per kill."""
    verdict = "equal" if not story.wrong else "DIFFERENT"
    print(f"{count:4d} kills · {story.scenario} · {story.lives} lives · {story.seconds:.1f} s · {verdict}", flush=True)
    for how, place in story.kills:
        print(f"       {how} -> {place}")
    for line in story.wrong[:SHOWN]:
        print(f"       WRONG: {line}", flush=True)


def close(stories: list[Story], seed: int, seconds: float) -> int:
    """The sums."""
    kills = [(story.scenario, *_sort(how, place)) for story in stories for how, place in story.kills]
    wrong = [line for story in stories for line in story.wrong]
    for title, at in (("run", 0), ("way", 1), ("place", 2)):
        counted = Counter(kill[at] for kill in kills).most_common()
        print(f"by {title}: " + " · ".join(f"{name} {number}" for name, number in counted))
    noticed = [seconds for story in stories for seconds in story.noticed]
    if noticed:
        print(f"a worker left behind ended {max(noticed):.1f} s after the other's death at the latest ({len(noticed)} times)")
    print(f"seed {seed}: {len(kills)} kills in {seconds:.0f} s, {len(wrong)} differences")
    return 1 if wrong else 0


def _sort(how: str, place: str) -> tuple[str, str]:
    """``aimed: bytes, middle; all workers`` -> ``aimed; all workers``; of a place what says most."""
    way, _, whom = how.partition(";")
    return way.partition(":")[0] + (";" + whom if whom else ""), place.partition("/")[2] or place


if __name__ == "__main__":
    sys.exit(main())
