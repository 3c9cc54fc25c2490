"""Wrong labels and misspelled notes at nested, seeded rates; canaries in continued pre-training."""
