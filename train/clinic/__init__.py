"""Synthetic cancer notes with their annotations."""
