"""Robustness to wrong labels and misspelled notes at nested rates; memorisation of canaries."""
