"""Results in the store: rows of tables, missing results, selection, explanation, and clean-up."""
