"""A table as one HTML page: its numbers, its images side by side, and what its layers lose."""
