"""Drop schedules calibrated on samples: allocated by layer sensitivity (QUOTA), or searched for."""
