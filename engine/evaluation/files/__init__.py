"""Files that evaluations write beside their reports, and their verification."""
