"""What the project promises in figures; each figure is a command, and RESULTS.md says what it gave."""
