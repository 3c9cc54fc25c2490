"""A page to paste a note into, and the same as a JSON API."""
