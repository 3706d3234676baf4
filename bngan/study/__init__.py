"""The claims laboratory: many runs, and a verdict on what is said about batch norm."""
