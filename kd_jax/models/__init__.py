"""Networks: any model as two pure functions, and the doors through which it comes."""
