// The emulator's twin of cuda/ptx/tensor_map.h.
#pragma once
#include <emulator/tma.h>

namespace ptx {

using TensorMap = emulator::TensorMap;
using emulator::make_tensor_map;

}  // namespace ptx
