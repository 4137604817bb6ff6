"""How pushes become steps: a small state machine for each consistency mode."""
