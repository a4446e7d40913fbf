"""Knowledge distillation: from any teacher into any student, with any published method."""
