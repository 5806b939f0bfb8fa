"""Recipe -> calibration -> passes -> compressed checkpoint."""
