"""One file per claim; each prints a short table, ends with one JSON line and can write a result file."""
