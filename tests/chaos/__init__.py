"""Real training disturbed from a seeded schedule: what is left at the end must be what is left of an undisturbed one.

python -m tests.chaos --minutes 30 [--seed S]
"""
