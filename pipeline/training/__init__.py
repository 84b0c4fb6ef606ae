"""What the training loop calls: task, trainer, monitor and the processes' coordination."""
