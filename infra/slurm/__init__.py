"""A real Slurm on loopback, in one folder: for the tests of sites, and to try Headrace without a facility.

Rooms: ``layout`` (its folders and configuration as text), ``daemons`` (processes by pid, also over a restart of ours),
``cluster`` (start, stop, and the faults an operator or a power cut makes), ``sbatch`` (an ``sbatch`` that times out
when told to), ``pbs`` (the commands of PBS over Slurm), ``site`` (the cluster as a site of a platform), ``__main__``
(``python -P -m infra.slurm``).

Imports ``headrace`` and its neighbours in ``infra``.
"""
