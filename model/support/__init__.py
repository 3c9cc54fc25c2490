"""What every program uses: command lines, atomic files, the hardware probe."""
