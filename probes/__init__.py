"""What is learnt on a model's activations: probes, erasers. Nothing is here yet; the workbench itself never imports it."""
