"""What should run, by when: decisions without I/O. Structs and the time go in, structs come out.

Rooms: ``catalog`` (registering), ``routing`` (events to routes), ``admission`` (the first invocation of a run), ``qos``
(deadlines and lanes), ``quotes`` (will the answer be in time), ``effects`` (an outcome and what it starts), ``scopes``
(branches that end together), ``retries`` (another attempt or not), ``revisions`` with ``voevent`` (what an event
replaces or takes back), ``replays`` (another go for what failed), ``sizes`` (how many outcomes a run comes to),
``ladder`` and ``rungs`` (which variant answers in time, and what it puts into the log), ``runaway`` (endless runs);
``forecast`` (how long it takes) and ``order`` with ``due`` and ``reserve`` (what starts next), which the benchmark of
deadlines judges.
``examples/`` holds the science functions that ship with Headrace.

May import ``headrace`` and ``streams``.
"""
