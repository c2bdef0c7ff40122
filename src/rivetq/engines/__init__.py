"""What stands behind the seam of `rivetq.engine`: a machine with files, one without, one that only looks."""
