"""What teachers are: those that answer inputs, and those whose answers are kept, in memory or on disk."""
