"""The arguments that several commands share."""

from __future__ import annotations

import argparse

from asyncdiff_nodes.engine import Plan, PlanError


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def parse_plans(text: str) -> list[Plan]:
    """Plans written as ``N,S,W`` or ``N,S,W,C``, ``2xN,S,W`` for two branches, and separated by semicolons."""
    plans = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            branches, _, numbers = part.rpartition("x")
            segments, stride, warmup, *more = (int(number) for number in numbers.split(","))
            (cooldown,), branches = more or [0], int(branches or 1)
        except ValueError:
            raise PlanError(
                f"--plans: {part!r} is not a plan: write segments,stride,warmup such as 2,1,1 or with a cool-down 2,1,3,1"
            ) from None
        plans.append(Plan(segments, stride, warmup, cooldown=cooldown, branches=branches))
    if not plans:
        raise PlanError(f"--plans: no plan in {text!r}: write segments,stride,warmup such as '2,1,1;3,1,1'")
    return plans
