"""A job's specification: PSI/J's words, and errors at the line that asks for what no site can do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headrace import JobAttributes, JobSpec, Resources
from headrace.errors import BadName, BadRequest, HeadraceError, TooLarge

GIB = 1024**3


def test_the_specification_of_the_contract_travels_as_it_is() -> None:
    spec = JobSpec(
        executable="lj",
        arguments=["-n", "1000"],
        environment={"OMP_NUM_THREADS": "4"},
        resources=Resources(node_count=2, processes_per_node=4, gpu_cores_per_process=1, memory=8 * GIB),
        attributes=JobAttributes(duration="10m", queue_name="gpu", custom_attributes={"slurm.qos": "urgent"}),
        inputs={"frames.h5": "s3://shots/118.h5"},
        outputs=["energy.csv", "figures/rdf.png"],
        sites=["lab"],
        container="lj.sif",
    )
    assert msgspec.json.decode(msgspec.json.encode(spec), type=JobSpec) == spec
    assert (spec.resources.nodes, spec.resources.processes, spec.resources.gpus) == (2, 8, 8)
    assert spec.attributes.duration_s == 600.0


def test_what_is_left_out_follows_as_psij_counts() -> None:
    assert (Resources().nodes, Resources().processes, Resources().gpus) == (1, 1, 0)
    assert (Resources(process_count=8).nodes, Resources(node_count=3).processes) == (1, 3)
    assert Resources(process_count=8, processes_per_node=4).nodes == 2


def test_a_dict_stands_for_the_struct_of_its_words() -> None:
    given: Any = {"node_count": 2}
    assert JobSpec(executable="x", resources=given).resources == Resources(node_count=2)


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"node_count": 0}, "node_count is 0"),
        ({"memory": -1}, "memory is -1"),
        ({"gpu_cores_per_process": -1}, "gpu_cores_per_process is -1"),
        ({"node_count": 2, "processes_per_node": 4, "process_count": 6}, "are 8 processes, and process_count says 6"),
        ({"node_count": 2, "process_count": 3}, "3 processes cannot be shared out evenly over 2 nodes"),
        ({"processes_per_node": 2, "process_count": 3}, "with 2 on each node"),
        ({"node_count": "2"}, "node_count: Expected `int | null`, got `str`"),
    ],
)
def test_resources_that_contradict_themselves_say_how(resources: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said.replace("|", r"\|")):
        Resources(**resources)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"executable": ""}, "executable is empty"),
        ({"executable": "a\nb"}, "executable holds a control character"),
        ({"arguments": ["a\0b"]}, "number 0 holds a NUL"),
        ({"directory": "here"}, "here is not absolute"),
        ({"directory": "/scratch/a\\b"}, "backslash"),
        ({"environment": {"A B": "1"}}, "'A B' is not the name of a variable"),
        ({"environment": {"HEADRACE_TOKEN": "1"}}, "HEADRACE_TOKEN belongs to Headrace"),
        ({"inputs": {"../up": "s3://b/k"}}, "'../up' is no file"),
        ({"inputs": {"a": "no uri"}}, "a is not given by a URI"),
        ({"outputs": ["/etc/passwd"]}, "'/etc/passwd' is no file"),
        ({"outputs": [".headrace/claim"]}, "is no file"),
        ({"outputs": ["a", "a"]}, "'a' is given twice"),
        ({"outputs": ["frames/*.npz"]}, "npz' is a pattern"),
        ({"inputs": {"stdout.txt": "s3://b/k"}}, "stdout.txt is where the job's own words go"),
        ({"container": "--privileged"}, "is not an image"),
        ({"launcher": "rm"}, "'rm' is not known"),
        ({"attributes": JobAttributes(custom_attributes={"slurm.qos": "x"}), "sites": ["a", "a"]}, "given twice"),
        ({"resources": 3}, "resources: Expected `object`, got `int`"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as error:
        JobSpec(**{"executable": "x", **fields})
    assert said in str(error.value)


def test_attributes_are_checked_too() -> None:
    with pytest.raises(BadRequest, match="duration"):
        JobAttributes(duration="soon")
    with pytest.raises(BadRequest, match="names no batch system"):
        JobAttributes(custom_attributes={"qos": "urgent"})
    with pytest.raises(BadRequest, match="control character"):
        JobAttributes(custom_attributes={"slurm.qos": "x\n#SBATCH --uid=0"})
    with pytest.raises(BadName):
        JobSpec(executable="x", sites=["no site"])


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ((Resources, {"memory": "16 GB"}), "16 * 2**30"),
        ((JobAttributes, {"duration": 60}), '"10m"'),
        ((JobSpec, {"executable": "x", "sites": "lab"}), '["lab"]'),
        ((JobSpec, {"executable": "x", "arguments": "--steps 10"}), '["--steps", "1000"]'),
    ],
)
def test_a_wrong_type_is_told_with_its_cure(wrong: tuple[type, dict[str, Any]], cure: str) -> None:
    of, fields = wrong
    with pytest.raises(BadRequest, match="Expected") as caught:
        of(**fields)
    assert cure in caught.value.hint


def test_a_job_may_keep_what_it_printed() -> None:
    assert JobSpec(executable="x", outputs=["stdout.txt"]).outputs == ["stdout.txt"]


def test_a_specification_has_a_size_limit() -> None:
    with pytest.raises(TooLarge, match="at most 262144"):
        JobSpec(executable="x", arguments=["y" * 300_000])


def test_an_unknown_field_is_an_error_on_the_wire() -> None:
    with pytest.raises((msgspec.ValidationError, HeadraceError), match="nodes"):
        msgspec.json.decode(b'{"executable": "x", "resources": {"nodes": 2}}', type=JobSpec)
