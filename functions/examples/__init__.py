"""The science functions that ship with Headrace: small, complete, and written as a user would write them.

    fusion               between-shot spectral analysis of a tokamak: a flag, then the modes of a flagged shot
    crystallography      serial crystallography: the hits of a run and its hit rate
    indexing             the unit cell of the hits, chained from crystallography by name
    molecular_dynamics   Lennard-Jones energies and dynamics
    md_campaign          a run stop that starts a simulation in a batch queue, and what comes of it; with ``campaign/``
    alerts               triage of transient alerts (GCN notices, VOEvents, gravitational-wave alerts)

Each file can be deployed as it is (``headrace deploy FILE.py``) and imports nothing of ours but ``headrace``.
``data/`` holds their inputs with the known answers; ``data/NOTICE.md`` names the sources and licences.
"""
