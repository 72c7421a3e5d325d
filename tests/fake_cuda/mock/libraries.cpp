// cuBLAS, cuDNN and their like: calls come to nothing, but that products of matrices are launches.
#include "machine.h"

using namespace mock;

namespace {

thread_local cudaStream_t stream_of_cublas = nullptr;

}  // namespace

API long cublasSetStream_v2(void*, cudaStream_t stream) {
    stream_of_cublas = stream;
    return 0;
}

API long multiply_matrices(...) { return launch("cublas_gemm", stream_of_cublas, 1, 1); }
API long do_nothing(...) { return 0; }

#define STUB(name) asm(".globl " #name "\n.set " #name ", do_nothing")
#define PRODUCT(name) asm(".globl " #name "\n.set " #name ", multiply_matrices")
#include "stubs.inc"  // made by build.py

// A launch in the name of cuDNN: cudnn.py has its operations.
API int fake_cuda_launch(const char* name, cudaStream_t stream) { return launch(name, stream, 1, 1); }
