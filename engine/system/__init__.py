"""The machine: devices and number formats, the processes of a run, CUDA streams, what a run was made with."""
