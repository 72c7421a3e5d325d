"""Speed of a training: traces of its steps, and its share of the peak of a device."""
