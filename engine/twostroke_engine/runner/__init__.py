"""What turns a `StepPlan` into tensors, runs the model and answers with tokens."""
