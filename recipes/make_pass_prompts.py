"""Writes `pass-prompts.jsonl`: prompts of our own, on many subjects and on Python code, for `pass-smollm2.yaml`.

python recipes/make_pass_prompts.py > recipes/pass-prompts.jsonl
"""

import json
import random
import sys

SUBJECTS = """
how rainbows form; why leaves change colour; the water cycle; how vaccines work; the history of chess; the Roman roads;
how bread rises; why the Moon has phases; what inflation is; how a bicycle stays upright; the life of honeybees; volcanoes;
how glass is made; the printing press; the Silk Road; how sound travels; the rules of football; what a black hole is;
how coffee is grown; the human heart; sleep and dreams; how tides work; the invention of the telephone; coral reefs;
learning a new language; saving money; moving to another city; a first job interview; growing tomatoes; keeping a diary;
running a small bakery; a long train journey; training a puppy; choosing a laptop; public libraries; working from home;
renewable energy; electric cars; healthy breakfasts; packing for a hike; friendship; writing a good letter; city parks;
musical instruments; learning to swim; photography for beginners; the ocean floor; desert animals; how planes fly;
medieval castles; the Olympic Games; how computers store numbers; the solar system; recycling; weather forecasts;
time management; a rainy Sunday; the first day of school; an old lighthouse; a lost key; a talking cat; a village market
"""
ASKS = [
    "Explain {} to a ten-year-old.",
    "Write a short essay about {}.",
    "Give me five facts about {}.",
    "Write a short story that has to do with {}.",
    "What are the most common misunderstandings about {}?",
    "Write a friendly email to a colleague about {}.",
    "Summarise what a beginner should know about {} in a list.",
    "Write a dialogue between a teacher and a student about {}.",
    "What would you ask an expert about {}? Give ten questions.",
    "Write a blog post about {} with an introduction and three sections.",
]
TASKS = """
counts the vowels in a string; returns the n-th triangular number; merges two sorted lists; removes duplicates;
checks whether brackets are balanced; converts Celsius to Fahrenheit; finds the second largest number in a list;
reverses the words of a sentence; computes the greatest common divisor; transposes a matrix; flattens a nested list;
counts how often each word occurs; checks whether a year is a leap year; rotates a list by k places; reads a CSV file;
finds all divisors of a number; computes a running average; groups words by their first letter; validates an email address;
finds the longest common prefix; computes the n-th row of Pascal's triangle; converts a number to Roman numerals;
searches a sorted list by bisection; sorts a list by insertion; writes a dictionary to a JSON file; counts lines in a file;
checks whether two words are anagrams; computes the dot product of two vectors; splits a list into chunks of size n;
replaces every third character; finds the median; parses a date; formats seconds as hours; caches its results;
generates all permutations; simulates rolling dice; draws a triangle of stars; finds missing numbers
"""
CODE_ASKS = [
    "Write a Python function that {}.",
    "Write a Python function that {}, with a docstring and an example.",
    "Write a Python function that {}, and explain it line by line.",
    "Finish this code:\n\n```python\ndef solve(value):\n    # {}\n```",
    "Show two ways to write a Python function that {}. Which is better?",
]


def split(text: str) -> list[str]:
    """The parts between semicolons."""
    return [part for piece in text.split(";") if (part := " ".join(piece.split()))]


def main() -> None:
    """Write the prompts to stdout."""
    prose = [ask.format(subject) for subject in split(SUBJECTS) for ask in ASKS]
    code = [ask.format(task) for task in split(TASKS) for ask in CODE_ASKS]
    chance = random.Random(0)
    chosen = chance.sample(prose, 460) + code
    chance.shuffle(chosen)
    for prompt in chosen:
        sys.stdout.write(json.dumps({"prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
