"""Who acts, who judges and who learns, apart from where they run: `roles` do the work, a `Crew` knows where."""
