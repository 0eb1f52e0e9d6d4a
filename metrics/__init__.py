"""From a model's answers to numbers: values, intervals, comparisons, floors, and the validation of a training."""
