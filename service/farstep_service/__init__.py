"""The farstep server: sessions, update rules, and the HTTP service around them."""
