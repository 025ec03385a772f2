"""What models are asked: beginnings to continue, and questions about code, about anything else, and edits of a file."""

from __future__ import annotations

COMPLETION = "def quicksort(items):"
LONG_ANSWER = "Write a Python function that merges two sorted lists, explain how it works, and give three examples.\n"

CODE = (
    "Write a Python class for a bounded LRU cache with get, put and delete, and a short usage example.",
    "Write a C function that reverses a singly linked list, and a main function that tests it.",
    "Write a SQL query that lists the ten customers with the highest total of orders last year, and explain it.",
    "Write a JavaScript function that debounces another function, with an example of its use.",
    "Implement binary search over a sorted slice in Go, with a table-driven test.",
    "Write a Rust program that counts the words of a text file and prints the twenty most frequent.",
    "Write a Python script that reads a CSV file and prints the mean and the median of each numeric column.",
    "Implement a thread-safe queue in C++17 with push, pop that waits, and close.",
    "Write a bash script that backs up a directory to a dated archive and keeps the last seven.",
    "Write a Python function that parses an ISO 8601 duration into seconds, with doctests.",
)
PROSE = (
    "Why did the Roman Republic fall? Explain the main causes in a few paragraphs.",
    "Describe how a bicycle stays upright while moving, for a curious teenager.",
    "What should someone think about before adopting a dog from a shelter?",
    "Explain to a new colleague how to give useful feedback on a text.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "How does a central bank influence inflation, and what are the limits of that influence?",
    "Compare living in a large city with living in a small village.",
    "Explain how vaccines train the immune system, and why boosters are sometimes needed.",
    "Write a letter to a landlord that asks politely for a broken heater to be repaired.",
    "What makes a good cup of coffee? Go through the steps and what can go wrong.",
)
_FILES = (
    """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
""",
    """def read_config(path):
    config = {}
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            key, value = line.split("=", 1)
            config[key.strip()] = value.strip()
    return config
""",
    """#include <stdio.h>

int gcd(int a, int b) {
    while (b != 0) {
        int r = a % b;
        a = b;
        b = r;
    }
    return a;
}

int main(void) {
    printf("%d\\n", gcd(48, 36));
    return 0;
}
""",
)
_CHANGES = (
    "Repeat this file exactly, but give every function a one-line comment that says what it does",
    "Repeat this file exactly, with the first function renamed to `process`",
    "Repeat this file exactly, with one more function of your choice at its end",
)
EDIT = tuple(f"{change}:\n```\n{file}```" for file in _FILES for change in _CHANGES)
SETS = {"code": CODE, "prose": PROSE, "edit": EDIT}
