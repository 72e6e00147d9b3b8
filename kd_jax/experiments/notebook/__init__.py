"""The reference notebook's experiment: teacher, students alone, distilled students."""
