"""A session and its files: when a snapshot is due, and how the session comes back from them, whole or in part."""
