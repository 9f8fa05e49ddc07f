"""``lasp bench``: measurements of links, exchanges, layers, models and scaling, on ranks of any kind.

A benchmark is a driver that asks ranks (:mod:`lasp.launch.bench.ranks`) to run a function of one rank, and writes what
they answer (:mod:`lasp.launch.bench.results`). The ranks may be those of a job, processes of this machine, or hosts of
a virtual cluster (:mod:`lasp.launch.bench.virtual_cluster`): no driver can tell.
"""
