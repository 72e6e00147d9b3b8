"""All methods of kd_jax side by side: one teacher, one student, one budget, and weights chosen by as many trials."""
