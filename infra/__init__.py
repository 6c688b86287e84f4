"""Wiring: the only place that reads the environment, opens connections and starts processes.

Rooms: ``settings`` (what an operator can set), ``credentials`` (secret files), ``rights`` (what each role may do on the
log's server), ``locking`` (one platform per data folder), ``process`` (a child process that is kept up), ``logfile``
(where its output goes), ``readiness`` and ``probe`` (is it ready), ``embedded`` (nats-server and redis-server as
children), ``programs`` (where they are installed), ``staging`` (where atomic batches wait), ``mending`` (what a power
cut damaged), ``stores`` (where bytes are kept and fetched from), ``rgw`` (a real S3 server for tests), ``services``
(gateway, worker and ledger, wired), ``up`` (all of it in one terminal), ``doctor`` (what is wrong and its cure),
``telemetry`` (log lines), ``lean`` (a smaller start), ``cli`` (the server commands), ``replaying`` (the past under
another policy), ``demo`` and ``demo_triggers`` (what it sends, and the known answers), ``bench``.

May import everything; nothing imports it.
"""
