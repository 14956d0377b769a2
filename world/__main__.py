"""Write a simulated platform's logs, without training on them.

    python -m world people --users 500 --seed 7 --out DIR
"""

import argparse

from config import load_config
from files import script
from world import people


def main() -> None:
    defaults = load_config().world  # those of a training run, so that seeds agree
    parser = argparse.ArgumentParser(prog="python -m world", description=__doc__.split("\n")[0])
    parser.add_argument("platform", choices=["people"])  # to be joined by a shop and dialogues
    parser.add_argument("--users", type=int, default=defaults.users)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    # By way of the config, which refuses a number out of bounds in the usual words.
    words = [f"world.users={arguments.users}", f"world.seed={arguments.seed}"]
    world = people.World(load_config(None, words).world)
    world.write(arguments.out)
    sessions, lists = sum(len(user.sessions) for user in world.users), len(world.impressions)
    untapped = sum(not shown.clicked for shown in world.impressions) / lists
    print(f"{arguments.out}: {len(world.users)} users, {sessions} sessions, {lists} lists, "
          f"{untapped:.0%} without a tap")  # what a real log has: 50 to 90 %


if __name__ == "__main__":
    script(main)
