"""Runs whose function has variants, in the simulation: what they do, and what has to come of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from functions.rungs import full_id, rung_id
from headrace.model import FunctionOptions, Route
from headrace.names import invocation_id
from headrace.wire import Expected, ForecastRow, FunctionRecord, Outcome
from streams.record import RunRecord
from tests.simulation import programs
from tests.simulation.programs import FULL, HALF, QUICK, RETRIES, Program, Step

if TYPE_CHECKING:
    from tests.simulation.check import Facts

VARIANTS = (HALF, QUICK)
ROUTE = Route(function=FULL, deadline="3s", on_late="degrade")


def functions() -> dict[str, FunctionRecord]:
    """Return the full function and its variants as they are registered."""
    made = {}
    for name in (FULL, *VARIANTS):
        options = FunctionOptions(timeout="30s", retries=RETRIES, variants=list(VARIANTS) if name == FULL else [])
        made[name] = FunctionRecord(name=name, version=f"{name}-1", options=options, code_blob=name, registered_at=0.0)
    return made


def forecasts() -> dict[str, ForecastRow]:
    """Return what is expected of them: nothing is known of the full one, so that it is tried."""
    return {HALF: ForecastRow(function=HALF, kinds={"answer|||": Expected(0.3, 0.5, 0.6, 100)}, at=0.0)}


def draw(rng: random.Random) -> Program:
    """Draw the program of one trigger: that of the full function, which holds those of its variants."""
    full = _draw(rng, rng.choice((0.01, 0.4, 2.0, 4.0, 7.0)), broken=0.25)
    if rng.random() < 0.15:
        full.steps = [Step(kind="call", programs=[Program(value=rng.randrange(1, 1000), work_s=2.0 * rng.random())])]
    full.variants = [_draw(rng, 0.3, broken=0.2), _draw(rng, 0.02, broken=0.1)]
    return full


def _draw(rng: random.Random, work_s: float, *, broken: float) -> Program:
    program = Program(value=rng.randrange(1, 1000), work_s=work_s * (0.5 + rng.random()))
    if rng.random() < broken:
        program.how = "permanent"
    elif rng.random() < 0.2:
        program.failures, program.how = rng.randrange(1, RETRIES + 1), rng.choice(("user", "lost", "timeout"))
    return program


def check(facts: Facts, run: str, program: Program, *, canceled: bool) -> list[str]:
    """Return what is wrong with a run: answers get better only, and the best that there can be is the last."""
    record, _ = facts.records[run]
    first = facts.first[run].invocation_id
    rescues = {rung_id(first, 1), rung_id(first, 2)}
    family = {first, full_id(first), *rescues}
    chain = {invocation_id(each, 0) for each in (first, full_id(first))}
    known = {i for i, several in facts.works.items() if several[0][1].run_id == run}
    done = {i: several[0][1] for i, several in facts.dones.items() if several[0][1].run_id == run}
    strange = sorted(known - family - chain)
    wrong = [f"ghost: the ladder {run} has the invocations {strange}"] if strange else []
    levels = [one.fidelity.level for one in record.answers]
    if levels != sorted(set(levels), reverse=True):
        wrong.append(f"wrong: the answers of {run} have the levels {levels}, one after the other")
    wrong += [
        f"wrong: {identity} rescues {run} and ended it, or filled a place of it"
        for identity, outcome in done.items()
        if identity in rescues and (outcome.end is not None or outcome.children)
    ]
    if record.state == "canceled" and canceled:
        return wrong
    if record.state == "canceled":
        return [*wrong, f"wrong: the ladder {run} was canceled by nobody"]
    if known - done.keys() and run not in facts.cancels:
        wrong.append(f"lost: the ladder {run} misses outcomes of {sorted(known - done.keys())}")
    return wrong + _end(run, record, program, done, first)


def _end(run: str, record: RunRecord, program: Program, done: dict[str, Outcome], first: str) -> list[str]:
    asked = done.get(first)
    if asked is None:
        return [f"lost: the ladder {run} ended without the one that was asked for"]
    if record.state == "failed":
        good = [each.function for each in done.values() if each.state == "succeeded"]
        broken = [each.how == "permanent" for each in (program, program.variants[-1])]
        return [] if all(broken) and not good else [f"wrong: the ladder {run} failed, and {good} went well"]
    answer = done.get(record.answer_id or "")
    if answer is None or record.answered_at is None:
        return [f"wrong: the ladder {run} succeeded without an answer"]
    payload = answer.answer if record.explicit else answer.result
    values = {FULL: program.value, HALF: program.variants[0].value, QUICK: program.variants[1].value}
    if program.steps:
        values[programs.WORK] = program.steps[0].programs[0].value
    if payload is None or int(payload.body) != values[answer.function]:
        return [f"wrong: the ladder {run} answers {payload}, which {answer.function} did not give"]
    level = 0 if record.fidelity is None else record.fidelity.level
    if program.how != "permanent" and asked.state == "succeeded" and level != 0:
        return [f"wrong: the full function went well in {run}, and the answer is of the level {level}"]
    levels = [each.fidelity.level for each in done.values() if each.fidelity and each.state == "succeeded"]
    best = min(levels, default=0)
    return [f"wrong: {run} answers at the level {level}, and had {best}"] if level != best else []
