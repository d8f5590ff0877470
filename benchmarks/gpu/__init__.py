"""The steps of the GPU suite: the plan, what each measures, and the table they end in."""
