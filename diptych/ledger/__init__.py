"""The ledger: every measured result with its recipe, seeds, machine, cost and confidence interval.

    entry = Entry(name="mini-world", kind="quality", system="bagel", level="E1", recipe={...}, sampling={...},
                  seeds=(0,), cost=Cost(seconds=5400), metrics={"caption": proportion(481, 500)})
    write_entry(entry)
    text = render_table(read_entries())
"""
from diptych.ledger.entry import (
    ENTRIES,
    LEVELS,
    Cost,
    Entry,
    Machine,
    Model,
    Pictures,
    read_entries,
    read_entry,
    write_entry,
)
from diptych.ledger.interval import Metric, mean, proportion, wilson
from diptych.ledger.report import Difference, compare, differing_keys, render_table

__all__ = ["ENTRIES", "LEVELS", "Cost", "Difference", "Entry", "Machine", "Metric", "Model", "Pictures", "compare",
           "differing_keys", "mean", "proportion", "read_entries", "read_entry", "render_table", "wilson",
           "write_entry"]
