"""Policies: one file each behind one contract (`base`)."""
