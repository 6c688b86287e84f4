"""How facts and work move, and where they rest.

Rooms: ``topology`` (subjects, lanes, limits), ``link`` (one connection), ``log`` (group commit and reads), ``replies``
(what the log's server answers), ``stored`` (a message as the log holds it), ``live`` (hearing what is stored), ``poll``
(pull requests that stay open), ``follow`` (ordered reading), ``intake`` (lanes to deliveries in deadline order),
``presence`` (which workers there are), ``tables`` (functions and routes), ``blobs`` (bytes by their hash), ``s3``
(those in a bucket), ``record`` (the facts of a run folded into its state), ``threads`` (revisions: which run is
overruled by which), ``newest`` (where only the last event counts), ``ledger`` (the read model in Redis), ``audit`` (is
a run on its way or has it ended) and ``auditor`` (which asks that of the oldest open ones).

May import ``headrace`` only. NATS and Redis are spoken here and nowhere else but ``infra``.
"""
