// Settings of libtorch that its C interface for Rust does not reach.

#include <ATen/Context.h>

// Makes every CUDA kernel give the same bits each time, with products in full precision; operations without a
// deterministic kernel fail. cuBLAS is deterministic with the fixed workspace of CUBLAS_WORKSPACE_CONFIG.
extern "C" void volary_deterministic_cuda() {
  auto& context = at::globalContext();
  context.setDeterministicAlgorithms(true, /*warn_only=*/false);
  // Every element is written before it is read.
  context.setDeterministicFillUninitializedMemory(false);
  context.setAllowTF32CuBLAS(false);
  // Sums of bf16 products stay in f32, also where a product is split.
  context.setAllowBF16ReductionCuBLAS(false, /*allow_splitk=*/true);
}
