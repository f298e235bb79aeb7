"""The task that the example 08 learns: write a number backwards, digit by digit, and then stop.

Whether an answer is right can be checked, and every right place counts. Here is no model: what needs torch is in
transformer.py.
"""

import random
from collections.abc import Sequence

END, ASK, PAD = 10, 11, 12  # marks beside the digits: the answer is over; it begins behind this; nothing
TOKENS = 13
LONGEST = 5  # digits
PROMPT, ANSWER = LONGEST + 1, LONGEST + 1  # tokens: digits and ASK; digits and END
LENGTHS = {"short": 3, "long": LONGEST}  # digits of a number, by the name of the environment


def prompt_of(digits: Sequence[int]) -> list[int]:
    """The tokens of a question, all of one length: `PAD ... digits ASK`."""
    return [PAD] * (LONGEST - len(digits)) + [*digits, ASK]


def reward_of(digits: Sequence[int], answer: Sequence[int]) -> float:
    """The part of the right answer, END included, that stands at its place; 1 only for the whole of it."""
    right = [*reversed(digits), END]
    return sum(given == wanted for given, wanted in zip(answer, right, strict=False)) / len(right)


def numbers(seed: int, count: int, held_out: int) -> tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]]:
    """So many numbers of each environment to train on, and others, which are none of these, for evaluation.

    Raises `ValueError` if there are not so many.
    """
    train, rest = {}, {}
    for name, length in LENGTHS.items():
        if count + held_out > 10**length:
            raise ValueError(f"there are {10**length} numbers of {length} digits, not {count} + {held_out}")
        drawn = random.Random(f"{seed} {name}").sample(range(10**length), count + held_out)
        digits = [[int(digit) for digit in f"{number:0{length}}"] for number in drawn]
        train[name], rest[name] = digits[:count], digits[count:]
    return train, rest
