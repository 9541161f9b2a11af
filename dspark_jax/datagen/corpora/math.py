"""Arithmetic word problems of two or three steps with worked answers, drawn from a seeded generator."""

import random

from dspark_jax.datagen.corpora.stdlib import split_of

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria",
          "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tom", "Zoe")  # fmt: skip
_GOODS = ("pens", "books", "apples", "cups", "stamps", "cards", "balls", "lamps", "shirts", "toys", "plants", "cakes",
          "hats", "eggs", "stickers", "marbles")  # fmt: skip
_PLACES = ("shop", "market", "school", "library", "farm", "park", "museum", "station")


def problem(rng: random.Random) -> tuple[str, str]:
    """One (question, worked answer); the answer ends with 'The answer is N.'"""
    # The last line is of one form, so that an evaluation can find the number.
    question, steps, result = rng.choice(_TEMPLATES)(rng)
    return question, "\n".join([*steps, f"The answer is {result}."])


def in_split(question: str, split: str) -> bool:
    """Whether a question belongs to a split; its text decides, so that no question is in both."""
    return split_of(question) == split


def _buy(rng: random.Random) -> tuple[str, list[str], int]:
    name, item = rng.choice(_NAMES), rng.choice(_GOODS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    # Numbers are drawn so that every intermediate result is a positive integer.
    paid = cost + rng.randint(1, 30)
    question = rng.choice((
        f"{name} buys {count} {item} for {price} dollars each and pays with {paid} dollars."
        f" How much change does {name} get?",
        f"A shop sells {item} for {price} dollars each. {name} has {paid} dollars and buys {count} {item}."
        " How many dollars are left?",
    ))  # fmt: skip

    return question, [
        f"The {item} cost {count} * {price} = {cost} dollars.",
        f"{name} has {paid} - {cost} = {paid - cost} dollars left.",
    ], paid - cost  # fmt: skip


def _two_goods(rng: random.Random) -> tuple[str, list[str], int]:
    name, (first, second) = rng.choice(_NAMES), rng.sample(_GOODS, 2)
    a, p, b, q = (rng.randint(2, 9) for _ in range(4))
    question = (
        f"{name} buys {a} {first} at {p} dollars each and {b} {second} at {q} dollars each."
        f" How much does {name} pay in total?"
    )

    return question, [
        f"The {first} cost {a} * {p} = {a * p} dollars.",
        f"The {second} cost {b} * {q} = {b * q} dollars.",
        f"Together that is {a * p} + {b * q} = {a * p + b * q} dollars.",
    ], a * p + b * q  # fmt: skip


def _give_away(rng: random.Random) -> tuple[str, list[str], int]:
    (name, other), item = rng.sample(_NAMES, 2), rng.choice(_GOODS)
    start, more = rng.randint(10, 60), rng.randint(2, 30)
    # Never all of them: the answer stays at least 1.
    given = rng.randint(2, start + more - 1)
    question = rng.choice((
        f"{name} has {start} {item}, finds {more} more and gives {given} to {other}."
        f" How many {item} does {name} have now?",
        f"{name} had {start} {item}. After getting {more} more, {name} gave {other} {given} of them."
        f" How many {item} are left?",
    ))  # fmt: skip

    return question, [
        f"{name} has {start} + {more} = {start + more} {item}.",
        f"After giving {given} to {other}, {name} has {start + more} - {given} = {start + more - given} {item}.",
    ], start + more - given  # fmt: skip


def _boxes(rng: random.Random) -> tuple[str, list[str], int]:
    name, item = rng.choice(_NAMES), rng.choice(_GOODS)
    boxes, each, loose = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 20)
    total = boxes * each + loose
    question = f"{name} has {boxes} boxes with {each} {item} each and {loose} loose {item}. How many {item} is that?"

    return question, [
        f"The boxes hold {boxes} * {each} = {boxes * each} {item}.",
        f"With the loose ones that is {boxes * each} + {loose} = {total} {item}.",
    ], total  # fmt: skip


def _share(rng: random.Random) -> tuple[str, list[str], int]:
    name, item = rng.choice(_NAMES), rng.choice(_GOODS)
    children, each, kept = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 12)
    # Built from the answer, so that the division leaves no remainder.
    total = children * each + kept
    question = (
        f"{name} has {total} {item}, keeps {kept} and shares the rest equally among {children} children."
        f" How many {item} does each child get?"
    )

    return question, [
        f"{name} shares {total} - {kept} = {children * each} {item}.",
        f"Each child gets {children * each} / {children} = {each} {item}.",
    ], each  # fmt: skip


def _week(rng: random.Random) -> tuple[str, list[str], int]:
    name, item = rng.choice(_NAMES), rng.choice(_GOODS)
    daily, days, sold = rng.randint(2, 9), rng.randint(3, 9), rng.randint(2, 15)
    made = daily * days
    # Never all of them.
    sold = min(sold, made - 1)
    question = (
        f"{name} makes {daily} {item} a day for {days} days and sells {sold} of them. How many {item} are not sold?"
    )

    return question, [
        f"In {days} days {name} makes {days} * {daily} = {made} {item}.",
        f"Not sold are {made} - {sold} = {made - sold} {item}.",
    ], made - sold  # fmt: skip


def _ages(rng: random.Random) -> tuple[str, list[str], int]:
    young, middle, old = rng.sample(_NAMES, 3)
    age, gap, factor = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 4)
    question = (
        f"{young} is {age} years old. {middle} is {gap} years older than {young}."
        f" {old} is {factor} times as old as {middle}. How old is {old}?"
    )

    return question, [
        f"{middle} is {age} + {gap} = {age + gap} years old.",
        f"{old} is {factor} * {age + gap} = {factor * (age + gap)} years old.",
    ], factor * (age + gap)  # fmt: skip


def _visitors(rng: random.Random) -> tuple[str, list[str], int]:
    place = rng.choice(_PLACES)
    first, gone, come = rng.randint(20, 70), rng.randint(2, 19), rng.randint(2, 30)
    question = (
        f"There are {first} people at the {place}. {gone} people leave and then {come} people come."
        f" How many people are at the {place} now?"
    )

    return question, [
        f"After {gone} leave there are {first} - {gone} = {first - gone} people.",
        f"After {come} come there are {first - gone} + {come} = {first - gone + come} people.",
    ], first - gone + come  # fmt: skip


def _trip(rng: random.Random) -> tuple[str, list[str], int]:
    name = rng.choice(_NAMES)
    speed, hours, walk = rng.randint(3, 12), rng.randint(2, 9), rng.randint(1, 20)
    total = speed * hours + walk
    question = (
        f"{name} cycles for {hours} hours at {speed} km per hour and then walks {walk} km."
        f" How many km does {name} travel?"
    )

    return question, [
        f"{name} cycles {hours} * {speed} = {hours * speed} km.",
        f"Together that is {hours * speed} + {walk} = {total} km.",
    ], total  # fmt: skip


def _half(rng: random.Random) -> tuple[str, list[str], int]:
    name, item = rng.choice(_NAMES), rng.choice(_GOODS)
    half, lost, found = rng.randint(5, 30), rng.randint(1, 4), rng.randint(2, 20)
    question = (
        f"{name} has {2 * half} {item} and sells half of them. Then {name} loses {lost} and buys {found} more."
        f" How many {item} does {name} have?"
    )

    return question, [
        f"{name} sells {2 * half} / 2 = {half} {item} and has {half} left.",
        f"After losing {lost} there are {half} - {lost} = {half - lost} {item}.",
        f"After buying {found} there are {half - lost} + {found} = {half - lost + found} {item}.",
    ], half - lost + found  # fmt: skip


_TEMPLATES = (_buy, _two_goods, _give_away, _boxes, _share, _week, _ages, _visitors, _trip, _half)
