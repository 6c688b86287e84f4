"""Workflows as graphs of tasks: measured ones from a folder of WfFormat files, or twins made of their statistics."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from functions.forecast import size_class

SHAPES = Path(__file__).parent / "data" / "shapes.json"


class Task(Struct, frozen=True):
    """One task: its category, how long it ran, the class of the size of its input, and whom it waits for."""

    category: str
    seconds: float
    size: int
    parents: tuple[int, ...]


class Dag(Struct, frozen=True):
    """A workflow; its tasks stand in an order in which parents come first."""

    name: str
    tasks: tuple[Task, ...]


class Category(Struct, frozen=True):
    """The tasks of one category: how many, the quartiles of their run time in seconds, their size class."""

    name: str
    count: int
    quartiles: tuple[float, float, float, float, float]
    size: int


class Shape(Struct, frozen=True):
    """The statistics of a workflow: categories in order, and edges (from, to, mean number of parents)."""

    name: str
    categories: list[Category]
    edges: list[tuple[int, int, float]]


def read(folder: Path | None) -> tuple[list[Dag], str]:
    """Return the workflows and one sentence that says where they come from.

    Raises:
        FileNotFoundError: the folder holds no WfFormat file.
    """
    if folder is None:
        return [twin(shape) for shape in shapes()], "synthetic twins of 16 WfCommons runs (data/shapes.json)"
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no WfFormat file (*.json): name the folder of WfCommons instances")
    return [measured(path) for path in files], f"{len(files)} WfCommons runs as measured"


def shapes() -> list[Shape]:
    """Return the statistics that ship with the bench."""
    return msgspec.json.decode(SHAPES.read_bytes(), type=list[Shape])


def _category(name: str) -> str:
    # Nextflow numbers the instances of a process, Pegasus and Makeflow append an id.
    if "NFCORE" in name:
        return name.split(" ")[0].split("(")[0]
    return name.split("_")[0]


def measured(path: Path) -> Dag:
    """Return the workflow of one WfFormat 1.5 file; a task without a measured run time takes none."""
    workflow: dict[str, Any] = json.loads(path.read_bytes())["workflow"]
    tasks = {task["id"]: task for task in workflow["specification"]["tasks"]}
    bytes_of = {file["id"]: file.get("sizeInBytes", 0) for file in workflow["specification"].get("files", [])}
    ran = {task["id"]: float(task.get("runtimeInSeconds", 0.0)) for task in workflow["execution"]["tasks"]}
    place: dict[str, int] = {}
    built: list[Task] = []

    def visit(identity: str) -> None:
        trail = [identity]
        while trail:
            at = trail[-1]
            missing = [parent for parent in tasks[at]["parents"] if parent not in place]
            if missing:
                trail += reversed(missing)
                continue
            trail.pop()
            if at not in place:
                size = sum(bytes_of.get(file, 0) for file in tasks[at].get("inputFiles", []))
                parents = tuple(place[parent] for parent in tasks[at]["parents"])
                place[at] = len(built)
                built.append(Task(_category(tasks[at]["name"]), ran.get(at, 0.0), size_class(size), parents))

    for identity in tasks:
        visit(identity)
    return Dag(path.stem, tuple(built))


def shape_of(dag: Dag) -> Shape:
    """Return the statistics of a workflow, from which ``twin`` makes one like it."""
    names = list(dict.fromkeys(task.category for task in dag.tasks))
    of: dict[str, list[Task]] = defaultdict(list)
    edges: Counter[tuple[int, int]] = Counter()
    for task in dag.tasks:
        of[task.category].append(task)
        for parent in task.parents:
            edges[names.index(dag.tasks[parent].category), names.index(task.category)] += 1
    categories = []
    for name in names:
        taken = sorted(task.seconds for task in of[name])
        last = len(taken) - 1
        low, first, middle, third, high = (round(taken[round(last * part / 4)], 3) for part in range(5))
        size = sorted(task.size for task in of[name])[last // 2]
        categories.append(Category(name, len(taken), (low, first, middle, third, high), size))
    return Shape(
        dag.name,
        categories,
        [(start, end, round(n / len(of[names[end]]), 3)) for (start, end), n in sorted(edges.items()) if start < end],
    )


def twin(shape: Shape) -> Dag:
    """Return a workflow with these numbers of tasks, run times between these quartiles, and as many edges."""
    rng = random.Random(shape.name)
    begins: list[int] = []
    built: list[Task] = []
    for place, category in enumerate(shape.categories):
        begins.append(len(built))
        for index in range(category.count):
            parents: list[int] = []
            for start, end, mean in shape.edges:
                if end != place:
                    continue
                count = shape.categories[start].count
                wanted = min(count, int(mean) + (rng.random() < mean - int(mean)))
                first = index * count // category.count
                parents += [begins[start] + (first + step) % count for step in range(wanted)]
            drawn = rng.random() * 4.0
            part = min(3, int(drawn))
            low, high = category.quartiles[part : part + 2]
            built.append(
                Task(category.name, round(low + (drawn - part) * (high - low), 3), category.size, tuple(parents))
            )
    return Dag(shape.name, tuple(built))
