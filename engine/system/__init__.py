"""The machine: devices and number formats, the processes of a run, CUDA streams, the record of the environment."""
