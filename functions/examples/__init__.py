"""The science functions that ship with Headrace: small, complete, and written as a user would write them.

    fusion               between-shot spectral analysis of a tokamak: a flag first, the full mode table for flagged shots
    crystallography      serial crystallography: find the hits of a run, join to a hit rate, index the hits
    molecular_dynamics   Lennard-Jones energies and dynamics
    alerts               triage of transient alerts (GCN notices, VOEvents, gravitational-wave alerts)

Each file can be deployed as it is (``headrace deploy FILE.py``) and imports nothing of ours but ``headrace``.
``data/`` holds their inputs with the known answers; ``data/NOTICE.md`` names the sources and licences.
"""
