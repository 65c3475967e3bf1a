"""Report -> text: one renderer a file; files whose name starts with an underscore are shared parts."""
