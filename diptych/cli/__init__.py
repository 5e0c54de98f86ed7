"""The `diptych` command: one small file per verb, each with `add(parser)` and `run(args)`.

Verb files import nothing heavy at the top, so that `diptych --help` answers at once.
"""
