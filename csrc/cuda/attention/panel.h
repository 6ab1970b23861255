// How a tile of 16-bit rows lies in shared memory: as panels of one swizzle width, 64 columns or, where the row is
// not a multiple of that, 32; each panel holds all rows of the tile.
#pragma once
#include <ptx/layout.h>

namespace attention {

template <int COLUMNS>
struct Panels {
  static constexpr int WIDTH = COLUMNS % 64 == 0 ? 64 : 32;  // in columns
  static constexpr int COUNT = COLUMNS / WIDTH;
  static constexpr uint32_t ROW_BYTES = 2 * WIDTH;
  static constexpr ptx::Swizzle SWIZZLE = WIDTH == 64 ? ptx::Swizzle::B128 : ptx::Swizzle::B64;
  static_assert(COLUMNS % 32 == 0, "columns come in multiples of 32");

  // Where the element is in a tile of ROWS rows.
  template <int ROWS>
  __device__ __forceinline__ static uint32_t address(uint32_t tile, int row, int column) {
    return ptx::swizzle(tile + (column / WIDTH * ROWS + row) * ROW_BYTES + column % WIDTH * 2, SWIZZLE);
  }
};

}  // namespace attention
