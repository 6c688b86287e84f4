"""What ``md_campaign`` brings along: the program of its jobs, ``lj_md``, and how a ``figure`` is drawn.

Neither imports anything of Headrace: the program has to run where only Python and NumPy are.
"""
