"""Report -> text: one renderer a file, found by its registration; files named with an underscore are shared parts."""
