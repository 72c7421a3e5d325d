// What a test reads and sets.
#include <cuda_runtime.h>

extern "C" void emulator_run_last_threads_first(bool yes) { emulator::last_first = yes; }
extern "C" int emulator_launches() { return emulator::launches; }
