"""The report of a run: tables, plots, failures and examples."""
