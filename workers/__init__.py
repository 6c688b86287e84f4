"""Where it runs: work is taken, run in a child process, and its outcome committed.

Rooms: ``worker`` (take, run, commit), ``voice`` (what an attempt says), ``joins`` (branches that end together, counted
in the log), ``ladder`` (variants that answer in time), ``staging`` (what ``ctx.stage`` and ``ctx.store`` ask for),
``guard`` (what may be fetched), ``egress``, ``lines`` and ``transfer`` (fetching it), ``cache`` (where it lies),
``pool`` (which child runs what), ``child`` (one child process), ``line`` and ``output`` (what goes in and comes out of
it), ``deaths`` (how it died), ``zygote`` (its parent), ``scratch`` (folders).

Of jobs at a site: ``agent`` (takes them), ``jobhand`` (what waits), ``readying`` (one job up to its submission),
``submitting``, ``attaching`` (from it on), ``jobwatch`` and ``jobends`` (how they are, and how they end), ``whywaits``,
``workfolder`` (which site it is), ``sitebook`` (its row), ``moves`` and ``adoption`` (jobs of sites that end).

What runs inside the child processes is in ``headrace``: ``zygote``, ``birth``, ``runner``.

May import ``headrace``, ``streams`` and ``functions``.
"""
