"""What farstep's figures are compared with: other ways to do the same between two processes of one machine."""
