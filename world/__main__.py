"""Write a simulated platform's logs, without training on them.

    python -m world people --users 500 --seed 7 --out DIR
    python -m world dialogues --contexts 4000 --seed 7 --out DIR
    python -m world shop --contexts 4000 --seed 7 --out DIR
"""

import argparse

from config import DialoguesConfig, ShopConfig, WorldConfig, load_config
from files import script
from llm.encoder import Encoder
from world import dialogues, people, shop


def main() -> None:
    defaults = load_config()  # those of a training run, so that seeds agree
    parser = argparse.ArgumentParser(prog="python -m world", description=__doc__.split("\n")[0])
    platforms = parser.add_subparsers(dest="platform", required=True)
    for platform, (section, size, _) in PLATFORMS.items():
        default, command = getattr(defaults, section), platforms.add_parser(platform)
        command.add_argument(f"--{size}", dest="size", type=int, default=getattr(default, size))
        command.add_argument("--seed", type=int, default=default.seed)
        command.add_argument("--out", required=True)
    given = parser.parse_args()
    section, size, write = PLATFORMS[given.platform]
    # By way of the config, which refuses a number out of bounds in the usual words.
    words = [f"{section}.{size}={given.size}", f"{section}.seed={given.seed}"]
    print(f"{given.out}: {write(getattr(load_config(None, words), section), given.out)}")


def write_people(settings: WorldConfig, out: str) -> str:
    world = people.World(settings)
    world.write(out)
    sessions, lists = sum(len(user.sessions) for user in world.users), len(world.impressions)
    untapped = sum(not shown.clicked for shown in world.impressions) / lists
    return (f"{len(world.users)} users, {sessions} sessions, {lists} lists, "
            f"{untapped:.0%} without a tap")  # what a real log has: 50 to 90 %


def write_dialogues(settings: DialoguesConfig, out: str) -> str:
    made = dialogues.Dialogues(settings, Encoder())
    made.write(out)
    shown = [row for row in made.log if row.suggestions]
    unclicked = sum(not row.clicked for row in shown) / max(1, len(shown))
    return (f"{len(made.log)} contexts, {len(shown)} with suggestions, {unclicked:.0%} of these "
            f"without a click; {len(made.evaluation)} contexts to evaluate on")


def write_shop(settings: ShopConfig, out: str) -> str:
    made = shop.Shop(settings)
    made.write(out)
    clicked = sum(bool(row.clicked) for row in made.log)
    return (f"{len(made.products)} products, {len(made.policies)} policies; {len(made.log)} "
            f"contexts, {clicked} of them clicked; {len(made.test)} to evaluate on")


PLATFORMS = {  # name -> section of the config, its setting of the size, what writes it
    "people": ("world", "users", write_people),
    "dialogues": ("dialogues", "contexts", write_dialogues),
    "shop": ("shop", "contexts", write_shop),
}


if __name__ == "__main__":
    script(main)
