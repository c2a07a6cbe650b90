"""Speed. Nothing here is imported by the packages, and no test of correctness lives here."""
