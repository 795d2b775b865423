"""Write the rows of `make flexora`: orders in plain words, and the record that a shop would make of each.

    {"prompt": "Please send three blue lamps to Oslo by train, before Friday.\\nRecord:",
     "completion": " 3 lamp | blue | Oslo | train | Friday"}

A language model as it comes never writes such a record; a few hundred rows teach it. The rows are a function of the
seed alone, no order comes twice, and the wordings of one are those of all.

Standard library only, as `fetch_demo.py`.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
ITEMS = {"lamps": "lamp", "chairs": "chair", "boxes": "box", "knives": "knife", "shelves": "shelf", "brushes": "brush"}
ITEMS |= {"cherries": "cherry", "tables": "table", "loaves": "loaf", "ladders": "ladder", "glasses": "glass"}
COLOURS = ("blue", "red", "green", "white", "black", "yellow", "grey", "brown")
CITIES = ("Oslo", "Lima", "Cairo", "Porto", "Delhi", "Kyoto", "Quito", "Turin", "Perth", "Lagos")
WAYS = ("train", "ship", "plane", "truck", "bike")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDINGS = (
    "Please send {count} {colour} {items} to {city} by {way}, before {day}.",
    "By {day} we need {count} {items} in {city}, {colour} ones; take the {way}.",
    "{city} wants {count} {items}. They must be {colour}, go by {way} and be there on {day}.",
    "On {day} a {way} leaves for {city}: put {count} {colour} {items} on it.",
)


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """So many different orders, with their records.

    Raises:
      ValueError: if there are not so many.
    """
    every = list(itertools.product(COUNTS, ITEMS, COLOURS, CITIES, WAYS, DAYS))
    if not 0 <= count <= len(every):
        raise ValueError(f"There are {len(every)} different orders, and not {count}.")
    draw = random.Random(seed)
    found = []
    for number, items, colour, city, way, day in draw.sample(every, count):
        words = {"count": number, "items": items, "colour": colour, "city": city, "way": way, "day": day}
        record = f" {COUNTS[number]} {ITEMS[items]} | {colour} | {city} | {way} | {day}"
        found.append({"prompt": draw.choice(WORDINGS).format(**words) + "\nRecord:", "completion": record})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the demonstration's rows.")
    parser.add_argument("file", type=Path, help="the .jsonl file to write")
    parser.add_argument("--rows", type=int, default=500, help="how many (500)")
    given = parser.parse_args()
    try:
        text = "".join(json.dumps(row) + "\n" for row in rows(given.rows))
        given.file.parent.mkdir(parents=True, exist_ok=True)
        part = given.file.with_name(f".{given.file.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(given.file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"  wrote {given.file} ({given.rows} rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
