"""How facts and work move, and where they rest.

Rooms: ``topology`` (subjects, lanes, limits), ``link`` (one connection), ``log`` (group commit and reads), ``stored``
(a message as the log holds it), ``live`` (hearing what is stored), ``poll`` (pull requests that stay open),
``follow`` (ordered reading), ``intake`` (lanes to deliveries in deadline order), ``tables`` (functions and routes),
``blobs`` (bytes by their hash), ``record`` (the facts of a run folded into its state), ``ledger`` (the read model in
Redis).

May import ``headrace`` only. NATS and Redis are spoken here and nowhere else but ``infra``.
"""
