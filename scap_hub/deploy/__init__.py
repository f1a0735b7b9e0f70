"""Files of a pruned model for the runtimes that people deploy on, each compared with the model, and int8."""
