"""Checkpoint files of other programs: read as untrusted input, streamed and checked."""
