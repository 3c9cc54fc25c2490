"""From notes to records of answers."""
