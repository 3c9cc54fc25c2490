"""Used by every program: command lines, atomic files, output locks, the hardware probe."""
