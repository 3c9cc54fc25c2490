"""What wrong labels and misspelled notes do to a model: seeded corruption at nested rates."""
