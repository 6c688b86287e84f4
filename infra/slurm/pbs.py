"""The dialect of PBS in front of a test cluster: ``qsub``, ``qstat``, ``qselect`` and ``qdel`` over Slurm. No real PBS.

Debian's ``slurm-wlm-torque`` brings a ``qsub`` that hands a script with ``#PBS`` lines to Slurm, and a plug-in that
gives jobs PBS's variables. The other three are ours: they print what PBS Professional (with ``-x``) or TORQUE (without)
prints, as their manuals have it, from what Slurm tells. So a job really runs, waits, ends and is lost, and only the
words are made up; queues, limits and hooks of a real PBS are not tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

PLUGIN = "spank_pbs.so"
PROGRAM = "qsub"
COMMANDS = ("qstat", "qselect", "qdel")

_SCRIPT = '''#!{python} -I
import re, subprocess, sys
from pathlib import Path

NODE_FAILED, TIMED_OUT, OUT_OF_MEMORY, NOT_STARTED = range(4)
PRO = {{NODE_FAILED: -20, TIMED_OUT: -29, OUT_OF_MEMORY: -27, NOT_STARTED: -1}}
TORQUE = {{NODE_FAILED: -4, TIMED_OUT: -11, OUT_OF_MEMORY: -10, NOT_STARTED: -1}}
SPECIAL = {{
    "NODE_FAIL": NODE_FAILED, "BOOT_FAIL": NODE_FAILED, "TIMEOUT": TIMED_OUT, "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "DEADLINE": NOT_STARTED,
}}
FIELDS = "JobArrayID:64|,JobID:32|,State:32|,exit_code:16|,RestartCnt:8|,NodeList:512|,Reason:128|,Name:128|"


def slurm(*command):
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        print(f"{{me}}: cannot connect to server headrace (errno=15010): {{ran.stderr.strip()}}", file=sys.stderr)
        sys.exit(1)
    return ran.stdout


def jobs():
    for line in slurm("squeue", "-h", "-r", "-t", "all", "--me", "-O", FIELDS).splitlines():
        yield [word.strip() for word in line.split("|")][:8]


def ours(native):
    """Slurm's name of a job, by PBS's."""
    return re.sub(r"\\[(\\d+)\\]", r"_\\1", native).replace("[]", "")


def show(native, job, classic):
    _, _, state, raw, restarts, nodes, why, name = job
    lines = {{"Job_Name": name, "comment": f"Slurm says {{state}}: {{why}}", "run_count": str(int(restarts) + 1)}}
    if nodes:
        lines["exec_host"] = "+".join(f"{{node}}/0" for node in nodes.split(","))
    letter, status, substate = "R", None, "42"
    raw = int(raw)
    if state in ("PENDING", "CONFIGURING"):
        letter, substate = ("H", "20") if why.startswith("JobHeld") else ("Q", "10")
    elif state == "COMPLETED":
        letter, status, substate = "F", 0, "92"
    elif state == "CANCELLED":
        letter, status, substate = "F", 271 if nodes or classic else None, "91"
    elif state in SPECIAL:
        letter, status, substate = "F", (TORQUE if classic else PRO)[SPECIAL[state]], "93"
    elif state == "FAILED":
        letter, status, substate = "F", 256 + (raw & 127) if raw & 127 else raw >> 8, "93"
    if letter == "F" and classic:
        letter = "C"
    lines["job_state"] = letter
    if not (classic and letter == "C"):
        lines["substate"] = substate
    if status is not None:
        lines["exit_status" if classic else "Exit_status"] = str(status)
    print(f"Job Id: {{native}}")
    for word, value in lines.items():
        text = f"    {{word}} = {{value}}"
        print("\\n\\t".join(text[i : i + 78] for i in range(0, len(text), 78)))  # PBS breaks long lines so
    print()


def qstat(arguments):
    classic = "-x" not in arguments
    known = {{}}
    for job in jobs():
        known[job[0]] = known[job[1]] = job
    missing = 0
    for native in (word for word in arguments if not word.startswith("-")):
        job = known.get(ours(native))
        if job is None:
            print(f"qstat: Unknown Job Id {{native}}", file=sys.stderr)
            missing = 153
        else:
            show(native, job, classic)
    return missing


def qselect(arguments):
    wanted = arguments[arguments.index("-N") + 1] if "-N" in arguments else None
    found = []
    for job in jobs():
        if wanted in (None, job[7]):
            number, member, _ = job[0].partition("_")
            found.append(number + "[]" * bool(member))
    print("\\n".join(dict.fromkeys(found)))


def qdel(arguments):
    slurm("scancel", *map(ours, arguments))


def qsub(arguments):
    script = Path(arguments[-1]).read_text()
    # Without these it would name files of its own; and that a job is not to be run again it reads here only.
    options = ["-o", "/dev/null", "-e", "/dev/null", *(["-r", "n"] if "\\n#PBS -r n\\n" in script else [])]
    ran = subprocess.run([{real!r}, *options, *arguments], capture_output=True, text=True)
    sys.stderr.write(ran.stderr)
    if ran.returncode:
        sys.stderr.write(ran.stdout)
        return ran.returncode
    print(ran.stdout.strip() + "[]" * ("\\n#PBS -J " in script))


me = Path(sys.argv[0]).name
sys.exit({{"qstat": qstat, "qselect": qselect, "qdel": qdel, "real-qsub": qsub}}[me](sys.argv[1:]))
'''


def install(real: str, folder: Path) -> Path:
    """Write the commands into ``folder``, and return the ``qsub`` that submits; ``real`` is that of Slurm."""
    for name in (*COMMANDS, "real-qsub"):
        script = folder / name
        script.write_text(_SCRIPT.format(python=sys.executable, real=real))
        script.chmod(0o755)
    return folder / "real-qsub"
