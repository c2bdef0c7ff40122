"""What is on disk: the log, the index, and how a directory is read again after a crash."""
