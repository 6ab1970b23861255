// sm_90: the descriptor of a tensor in global memory that TMA walks, encoded on the host.
#pragma once
#include <cuda.h>
#include <ptx/layout.h>
#include <ptx/types.h>

#include <stdexcept>
#include <string>

namespace ptx {

using TensorMap = CUtensorMap;

namespace detail {
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time, so that the module imports where there is no driver.
inline TensorMapEncoder tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("cannot encode a tensor map: ") + cudaGetErrorString(status));
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error("cannot encode a tensor map: the driver is older than CUDA 12.0");
  return reinterpret_cast<TensorMapEncoder>(function);
}
}  // namespace detail

// sizes, box: elements, innermost first, `rank` of them; strides_bytes: of dimensions 1 … rank-1, multiples of 16.
// box[0] spans at most swizzle_width(swizzle) bytes when swizzled; no box side exceeds 256. Out of bounds reads zeros.
inline TensorMap make_tensor_map(ElementType type, void* base, int rank, const uint64_t* sizes,
                                 const uint64_t* strides_bytes, const uint32_t* box, Swizzle swizzle) {
  static const detail::TensorMapEncoder encode = detail::tensor_map_encoder();
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  const uint32_t element_strides[] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status = encode(&map, types[static_cast<int>(type)], rank, base, sizes, strides_bytes, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return map;
  std::string tensor = "sizes";
  for (int i = 0; i < rank; ++i) tensor += " " + std::to_string(sizes[i]);
  tensor += ", strides in bytes";
  for (int i = 0; i + 1 < rank; ++i) tensor += " " + std::to_string(strides_bytes[i]);
  tensor += ", box";
  for (int i = 0; i < rank; ++i) tensor += " " + std::to_string(box[i]);
  throw std::runtime_error("the driver refuses a tensor map (error " + std::to_string(status) + ") of " + tensor +
                           ": base and strides have to be multiples of 16 bytes, box sides at most 256");
}

}  // namespace ptx
