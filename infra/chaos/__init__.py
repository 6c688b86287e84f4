"""The promise, tried from outside: a driver, a nemesis and a checker against ``headrace up``, each its own process.

``lines`` holds what they write and hand to each other. ``driver`` posts triggers with known ids and logs every reply;
``nemesis`` injects faults, the same ones for the same seed; ``effects`` are the functions, which note that they ran in
a file outside the system; ``checker`` reads nothing but the driver's log, the event log and that file, and ``judge``
gives the verdict. ``trial`` starts them for one case, ``launch`` starts the platform as a user does and starts it
again when it is killed, ``cases`` lists the faults and ``report`` says what came of them. Every fault is a room of its
own, named for what it does. ``make chaos`` runs them; ``python -P -m infra.chaos --help`` shows the options.
"""
