"""What is measured: accuracy over tasks, calibration, fidelity to the teacher, cost."""
